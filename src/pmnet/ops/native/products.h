// Matrix products in one order of summation: for every output, fused multiply-adds along the depth, from a sum of zero.
#pragma once
#include "vector.h"

// One tile of a product, as many sums as there are registers for.
#if defined(__AVX512F__)
constexpr int TILE_ROWS = 8, TILE_VECTORS = 3;
#elif defined(__AVX__)
constexpr int TILE_ROWS = 6, TILE_VECTORS = 2;
#else
constexpr int TILE_ROWS = 4, TILE_VECTORS = 4;
#endif
constexpr int TILE_COLUMNS = TILE_VECTORS * WIDTH;

// One round of `transpose`: blocks of STEP lanes change places between lines STEP apart.
template <int STEP>
static inline void exchange(vf* x) {
    const vi low = (LANE & STEP) != 0 ? LANE + (WIDTH - STEP) : LANE, high = (LANE & STEP) != 0 ? LANE + WIDTH : LANE + STEP;
    for (int i = 0; i < WIDTH; i++)
        if (!(i & STEP)) {
            vf a = x[i], b = x[i + STEP];
            x[i] = __builtin_shuffle(a, b, low);
            x[i + STEP] = __builtin_shuffle(a, b, high);
        }
}

// In place: line i of WIDTH becomes column i. First blocks of 4 x 4, which need no lane of another block of four; then
// the blocks change places.
static inline void transpose(vf* x) {
    const vi block = LANE & ~3, at = LANE & 3, half = at >> 1;
    const vi from_low = block + half + (at & 1) * WIDTH, from_high = from_low + 2;        // a0 b0 a1 b1, a2 b2 a3 b3
    const vi first = block + (at & 1) + half * WIDTH, second = first + 2;                 // a0 a1 b0 b1, a2 a3 b2 b3
    for (int i = 0; i < WIDTH; i += 4) {
        vf a = __builtin_shuffle(x[i], x[i + 1], from_low), b = __builtin_shuffle(x[i], x[i + 1], from_high);
        vf c = __builtin_shuffle(x[i + 2], x[i + 3], from_low), d = __builtin_shuffle(x[i + 2], x[i + 3], from_high);
        x[i] = __builtin_shuffle(a, c, first), x[i + 1] = __builtin_shuffle(a, c, second);
        x[i + 2] = __builtin_shuffle(b, d, first), x[i + 3] = __builtin_shuffle(b, d, second);
    }
    if constexpr (WIDTH > 4) exchange<4>(x);
    if constexpr (WIDTH > 8) exchange<8>(x);
}

// Adds line[lane][k] x[k] for k < deep <= WIDTH, in order, to the sums of ROWS rows: `count` lines, `inputs` apart.
template <int ROWS>
static inline void add_floats(const float* x, int64_t ldx, const float* line, int64_t inputs, int64_t count, int64_t deep, vf* total) {
    vf column[WIDTH];
    if (count >= WIDTH && deep == WIDTH) {
#pragma GCC unroll 16
        for (int i = 0; i < WIDTH; i++) read(line + i * inputs, &column[i]);
        transpose(column);
        for (int i = 0; i < WIDTH; i++)
            for (int r = 0; r < ROWS; r++) total[r] = fma(x[r * ldx + i] - vf{}, column[i], total[r]);
        return;
    }
    for (int i = 0; i < WIDTH; i++) column[i] = vf{};
    for (int i = 0; i < WIDTH && i < count; i++) read(line + i * inputs, &column[i], deep);
    transpose(column);
    for (int i = 0; i < deep; i++)  // past `deep`, columns are zero and x is not read
        for (int r = 0; r < ROWS; r++) total[r] = fma(x[r * ldx + i] - vf{}, column[i], total[r]);
}

// A product as wide as it likes: A[i][k] stands at a[i * row_a + k * step_a], B and C in lines ldb and ldc apart. With
// `add`, sums are added to what stands in C; bias, if any, comes last.
struct Product {
    int64_t row_a, step_a, ldb, ldc, depth;
    bool add;
};

// ROWS x VECTORS registers of C, of which the first `columns` lanes are written.
template <int ROWS, int VECTORS>
static inline void tile(const Product& p, const float* a, const float* b, float* c, int64_t columns, const float* bias) {
    vf total[ROWS][VECTORS] = {};
    for (int64_t k = 0; k < p.depth; k++) {
        vf line[VECTORS];
        for (int j = 0; j < VECTORS; j++) read(b + k * p.ldb + j * WIDTH, &line[j]);
        for (int i = 0; i < ROWS; i++) {
            vf x = a[i * p.row_a + k * p.step_a] - vf{};
            for (int j = 0; j < VECTORS; j++) total[i][j] = fma(x, line[j], total[i][j]);
        }
    }
    for (int i = 0; i < ROWS; i++)
        for (int j = 0; j < VECTORS; j++) {
            int64_t left = columns - j * WIDTH;
            float* at = c + i * p.ldc + j * WIDTH;
            vf v = total[i][j], other;
            if (p.add) read(at, &other, left), v = other + v;
            if (bias) read(bias + j * WIDTH, &other, left), v += other;
            write(at, v, left);
        }
}

// Any number of rows of one tile's width or less.
template <int VECTORS>
static inline void panel(const Product& p, int64_t rows, const float* a, const float* b, float* c, int64_t columns, const float* bias) {
    int64_t i = 0;
    for (; i + TILE_ROWS <= rows; i += TILE_ROWS) tile<TILE_ROWS, VECTORS>(p, a + i * p.row_a, b, c + i * p.ldc, columns, bias);
    for (; i + 4 <= rows; i += 4) tile<4, VECTORS>(p, a + i * p.row_a, b, c + i * p.ldc, columns, bias);
    for (; i < rows; i++) tile<1, VECTORS>(p, a + i * p.row_a, b, c + i * p.ldc, columns, bias);
}

// Any number of rows, and of columns that is a multiple of 16.
static inline void strip(const Product& p, int64_t rows, const float* a, const float* b, float* c, int64_t columns) {
    int64_t j = 0;
    for (; j + TILE_COLUMNS <= columns; j += TILE_COLUMNS) panel<TILE_VECTORS>(p, rows, a, b + j, c + j, TILE_COLUMNS, nullptr);
    for (; j < columns; j += LANES) panel<LANES / WIDTH>(p, rows, a, b + j, c + j, LANES, nullptr);
}
