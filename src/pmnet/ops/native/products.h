// Matrix products in one order of summation: for every output, fused multiply-adds along the depth, from a sum of zero.
#pragma once
#include "vector.h"


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

// Any number of columns that is a multiple of 16, and 1 to 8 rows. A[i][k] stands at a[i * row_a + k * step_a].
template <bool ADD>
static inline void strip(int64_t rows, const float* a, int64_t row_a, int64_t step_a, const float* b, int64_t ldb, float* c, int64_t ldc,
                         int64_t depth, int64_t columns) {
    while (rows > 0) {
        int64_t j = 0, done = rows >= 8 ? 8 : rows >= 4 ? 4 : 1;
        for (; j + 32 <= columns; j += 32)
            done == 8 ? tile<8, 2, ADD>(a, row_a, step_a, b + j, ldb, c + j, ldc, depth)
            : done == 4 ? tile<4, 2, ADD>(a, row_a, step_a, b + j, ldb, c + j, ldc, depth)
                        : tile<1, 2, ADD>(a, row_a, step_a, b + j, ldb, c + j, ldc, depth);
        for (; j < columns; j += 16)
            done == 8 ? tile<8, 1, ADD>(a, row_a, step_a, b + j, ldb, c + j, ldc, depth)
            : done == 4 ? tile<4, 1, ADD>(a, row_a, step_a, b + j, ldb, c + j, ldc, depth)
                        : tile<1, 1, ADD>(a, row_a, step_a, b + j, ldb, c + j, ldc, depth);
        rows -= done, a += done * row_a, c += done * ldc;
    }
}
