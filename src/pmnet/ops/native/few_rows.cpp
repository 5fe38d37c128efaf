// y = x W^T + b for up to 16 rows of x: bound by reading W once, not by arithmetic.
//
// The sum of an output runs over at most DEPTH inputs at a time, with fused multiply-adds from zero; the
// partial sums are added in turn, the bias last. This is what matrix libraries do for many rows (ops/linear.py checks it), so a
// position gets the same bits alone and in a long chunk.
//
// Weights are float [O, K], or 8-bit integers in panels [O / 16, K, 16] with one scale for each output.
#include "kernels.h"
#include "products.h"

constexpr int64_t AHEAD = 64;  // floats to prefetch ahead in each line of float weights; of integers, the next tiles

// Adds w[o + lane][k] x[k] for k from `k` to `to`, in order, to the sums of 16 TILES outputs of ROWS rows: 8-bit weights.
template <int ROWS, int TILES>
static inline void add_integers(const float* x, int64_t ldx, const Weight& w, int64_t o, int64_t k, int64_t to, const v16* scale, v16 (*total)[ROWS]) {
    const int8_t* panel = (const int8_t*)w.values + o * w.inputs;
    for (; k < to; k++)
        for (int t = 0; t < TILES; t++) {
            const int8_t* at = panel + (t * w.inputs + k) * LANES;
            if (k % 4 == 0) __builtin_prefetch(at + TILES * LANES * w.inputs);  // four of them are a cache line
            v16 column = widen(at) * scale[t];
            for (int r = 0; r < ROWS; r++) total[t][r] = fma(splat(x[r * ldx + k]), column, total[t][r]);
        }
}

// The same for 16 outputs and at most 16 k: float weights.
template <int ROWS>
static inline void add_floats(const float* x, int64_t ldx, const Weight& w, int64_t o, int64_t k, int64_t deep, int64_t ahead, v16* total) {
    const float* line = (const float*)w.values + o * w.inputs + k;
    int64_t count = w.outputs - o;
    v16 column[LANES];
    if (count >= LANES && deep == LANES)
        for (int i = 0; i < LANES; i++) {
            column[i] = load(line + i * w.inputs);
            __builtin_prefetch(line + i * w.inputs + ahead);
        }
    else
        for (int i = 0; i < LANES; i++) column[i] = i < count ? load(line + i * w.inputs, deep) : v16{};
    transpose16(column);
    for (int i = 0; i < LANES; i++)  // past `deep`, columns are zero and x is not read
        for (int r = 0; r < ROWS; r++)
            if (i < deep) total[r] = fma(splat(x[r * ldx + k + i]), column[i], total[r]);
}

// Outputs o .. o + 16 TILES - 1 of ROWS rows.
template <int ROWS, int TILES>
static inline void outputs_from(const float* x, int64_t ldx, const Weight& w, int64_t o, float* y, int64_t ldy) {
    v16 out[TILES][ROWS], scale[TILES];
    for (int t = 0; t < TILES; t++) scale[t] = w.scale ? load(w.scale + o + t * LANES, w.outputs - o - t * LANES) : v16{};
    int64_t passes = (w.inputs + DEPTH - 1) / DEPTH, step = (w.inputs + LANES * passes - 1) / (LANES * passes) * LANES;
    for (int64_t from = 0; from < w.inputs; from += step) {
        int64_t to = from + step < w.inputs ? from + step : w.inputs;
        v16 total[TILES][ROWS] = {};
        if (w.scale)
            add_integers<ROWS, TILES>(x, ldx, w, o, from, to, scale, total);
        else {
            int64_t k = from;
            for (; k + LANES <= to; k += LANES) {  // past the end of a line comes the same line of the next tiles
                int64_t ahead = k + AHEAD < w.inputs ? AHEAD : AHEAD + (TILES * LANES - 1) * w.inputs;
                for (int t = 0; t < TILES; t++) add_floats<ROWS>(x, ldx, w, o + t * LANES, k, LANES, ahead, total[t]);
            }
            for (int t = 0; k < to && t < TILES; t++) add_floats<ROWS>(x, ldx, w, o + t * LANES, k, to - k, 0, total[t]);
        }
        for (int t = 0; t < TILES; t++)
            for (int r = 0; r < ROWS; r++) out[t][r] = from ? out[t][r] + total[t][r] : total[t][r];
    }
    for (int t = 0; t < TILES; t++) {
        int64_t at = o + t * LANES, count = w.outputs - at;
        for (int r = 0; r < ROWS; r++) store(y + r * ldy + at, w.bias ? out[t][r] + load(w.bias + at, count) : out[t][r], count);
    }
}

template <int TILES>
static inline void all_rows(const float* x, int64_t ldx, const Weight& w, int64_t o, float* y, int64_t ldy, int64_t rows) {
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) outputs_from<4, TILES>(x + r * ldx, ldx, w, o, y + r * ldy, ldy);
    for (; r < rows; r++) outputs_from<1, TILES>(x + r * ldx, ldx, w, o, y + r * ldy, ldy);
}

void few_rows(const float* x, int64_t ldx, const Weight& w, float* y, int64_t ldy, int64_t rows) {
    constexpr int64_t WIDE = 4 * LANES;
#pragma omp parallel for schedule(static) if (w.outputs * w.inputs > 16384)
    for (int64_t from = 0; from < w.outputs; from += WIDE) {
        int64_t to = from + WIDE < w.outputs ? from + WIDE : w.outputs, o = from;
        if (w.scale && to - from == WIDE) all_rows<4>(x, ldx, w, o, y, ldy, rows), o = to;
        for (; o + 2 * LANES <= to; o += 2 * LANES) all_rows<2>(x, ldx, w, o, y, ldy, rows);
        for (; o < to; o += LANES) all_rows<1>(x, ldx, w, o, y, ldy, rows);
    }
}

extern "C" {

// x [R, K] dense, y [R, O]; scale null for float weights, bias null for none.
void linear_few_rows(const float* x, const void* values, const float* scale, const float* bias, float* y, int64_t rows, int64_t inputs,
                     int64_t outputs) {
    few_rows(x, inputs, Weight{values, scale, bias, inputs, outputs}, y, outputs, rows);
}
}
