// Matrix products in one order of summation: for every output, fused multiply-adds along the depth, from a sum of zero.
#pragma once
#include "vector.h"


// One round of `transpose16`: blocks of STEP lanes change places between lines STEP apart.
template <int STEP>
static inline void exchange(v16* x, i16 low, i16 high) {
    for (int i = 0; i < LANES; i++)
        if (!(i & STEP)) {
            v16 a = x[i], b = x[i + STEP];
            x[i] = __builtin_shuffle(a, b, low);
            x[i + STEP] = __builtin_shuffle(a, b, high);
        }
}

// In place: line i of 16 becomes column i, by exchanging halves, quarters, pairs and neighbours.
static inline void transpose16(v16* x) {
    {
        const i16 low = {0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23};
        const i16 high = {8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31};
        exchange<8>(x, low, high);
    }
    {
        const i16 low = {0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27};
        const i16 high = {4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31};
        exchange<4>(x, low, high);
    }
    {
        const i16 low = {0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29};
        const i16 high = {2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31};
        exchange<2>(x, low, high);
    }
    {
        const i16 low = {0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30};
        const i16 high = {1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31};
        exchange<1>(x, low, high);
    }
}

// C[i][j] = (add ? C[i][j] : 0) + sum_k A[i][k] B[k][j] for a tile of ROWS x 16 COLUMNS; the sum starts at zero.
template <int ROWS, int COLUMNS, bool ADD>
static inline void tile(const float* a, int64_t row_a, int64_t step_a, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t depth) {
    v16 total[ROWS][COLUMNS] = {};
    for (int64_t k = 0; k < depth; k++) {
        v16 line[COLUMNS];
        for (int j = 0; j < COLUMNS; j++) line[j] = load(b + k * ldb + j * LANES);
        for (int i = 0; i < ROWS; i++) {
            v16 x = splat(a[i * row_a + k * step_a]);
            for (int j = 0; j < COLUMNS; j++) total[i][j] = fma(x, line[j], total[i][j]);
        }
    }
    for (int i = 0; i < ROWS; i++)
        for (int j = 0; j < COLUMNS; j++) {
            float* at = c + i * ldc + j * LANES;
            store(at, ADD ? load(at) + total[i][j] : total[i][j]);
        }
}

template <int ROWS, bool ADD>
static inline void line_of_tiles(const float* a, int64_t row_a, int64_t step_a, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t depth,
                                 int64_t columns) {
    int64_t j = 0;
    for (; j + 48 <= columns && columns - j != 64; j += 48) tile<ROWS, 3, ADD>(a, row_a, step_a, b + j, ldb, c + j, ldc, depth);
    for (; j + 32 <= columns; j += 32) tile<ROWS, 2, ADD>(a, row_a, step_a, b + j, ldb, c + j, ldc, depth);
    for (; j < columns; j += 16) tile<ROWS, 1, ADD>(a, row_a, step_a, b + j, ldb, c + j, ldc, depth);
}

// Any number of rows, and of columns that is a multiple of 16. A[i][k] stands at a[i * row_a + k * step_a].
template <bool ADD>
static inline void strip(int64_t rows, const float* a, int64_t row_a, int64_t step_a, const float* b, int64_t ldb, float* c, int64_t ldc,
                         int64_t depth, int64_t columns) {
    while (rows > 0) {
        int64_t done = rows >= 8 ? 8 : rows >= 4 ? 4 : 1;
        if (done == 8) line_of_tiles<8, ADD>(a, row_a, step_a, b, ldb, c, ldc, depth, columns);
        if (done == 4) line_of_tiles<4, ADD>(a, row_a, step_a, b, ldb, c, ldc, depth, columns);
        if (done == 1) line_of_tiles<1, ADD>(a, row_a, step_a, b, ldb, c, ldc, depth, columns);
        rows -= done, a += done * row_a, c += done * ldc;
    }
}
