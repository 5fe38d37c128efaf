// y = x W^T + b, with rows that do not depend on their number.
//
// The sum of an output runs over at most DEPTH inputs at a time, with fused multiply-adds from zero; the partial sums
// are added in turn, the bias last. Few rows are bound by reading W once: it is transposed in registers on the way.
// Many rows share panels of W that are packed so that a tile of the product reads them in line.
//
// Weights are float [O, K], or 8-bit integers in panels [O / 16, K, 16] with one scale for each output.
#include "packed.h"

constexpr int64_t MANY = 16;          // rows from which packing pays
constexpr int64_t AHEAD = 64;         // floats to prefetch ahead in each line of float weights; of integers, the next tiles
constexpr int PARTS = LANES / WIDTH;  // registers of sixteen outputs

// Few rows

// Adds w[o + lane][k] x[k] for k from `k` to `to`, in order, to the sums of 16 TILES outputs of ROWS rows.
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

// Outputs o .. o + 16 TILES - 1 of ROWS rows: 8-bit weights.
template <int ROWS, int TILES>
static inline void integer_outputs(const float* x, int64_t ldx, const Weight& w, int64_t o, float* y, int64_t ldy) {
    v16 out[TILES][ROWS], scale[TILES];
    for (int t = 0; t < TILES; t++) scale[t] = load(w.scale + o + t * LANES, w.outputs - o - t * LANES);
    int64_t step = pass_of(w.inputs);
    for (int64_t from = 0; from < w.inputs; from += step) {
        v16 total[TILES][ROWS] = {};
        add_integers<ROWS, TILES>(x, ldx, w, o, from, from + step < w.inputs ? from + step : w.inputs, scale, total);
        for (int t = 0; t < TILES; t++)
            for (int r = 0; r < ROWS; r++) out[t][r] = from ? out[t][r] + total[t][r] : total[t][r];
    }
    for (int t = 0; t < TILES; t++) {
        int64_t at = o + t * LANES, count = w.outputs - at;
        for (int r = 0; r < ROWS; r++) store(y + r * ldy + at, w.bias ? out[t][r] + load(w.bias + at, count) : out[t][r], count);
    }
}

// Outputs o .. o + WIDTH VECTORS - 1 of ROWS rows: float weights.
template <int ROWS, int VECTORS>
static inline void float_outputs(const float* x, int64_t ldx, const Weight& w, int64_t o, float* y, int64_t ldy) {
    vf out[VECTORS][ROWS];
    const float* lines = (const float*)w.values + o * w.inputs;
    int64_t step = pass_of(w.inputs), count = w.outputs - o;
    for (int64_t from = 0; from < w.inputs; from += step) {
        int64_t to = from + step < w.inputs ? from + step : w.inputs;
        vf total[VECTORS][ROWS] = {};
        for (int64_t k = from; k < to; k += LANES) {
            if (k + LANES <= to && count >= VECTORS * WIDTH) {  // past the end of a line comes the same line of the next tiles
                int64_t ahead = k + AHEAD < w.inputs ? AHEAD : AHEAD + (VECTORS * WIDTH - 1) * w.inputs;
                for (int i = 0; i < VECTORS * WIDTH; i++) __builtin_prefetch(lines + i * w.inputs + k + ahead, 0, 2);
            }
            for (int v = 0; v < VECTORS; v++)
                for (int64_t at = k; at < to && at < k + LANES; at += WIDTH)
                    add_floats<ROWS>(x + at, ldx, lines + v * WIDTH * w.inputs + at, w.inputs, count - v * WIDTH, to - at < WIDTH ? to - at : WIDTH,
                                     total[v]);
        }
        for (int v = 0; v < VECTORS; v++)
            for (int r = 0; r < ROWS; r++) out[v][r] = from ? out[v][r] + total[v][r] : total[v][r];
    }
    for (int v = 0; v < VECTORS; v++) {
        int64_t at = o + v * WIDTH, left = w.outputs - at;
        vf bias{};
        if (w.bias) read(w.bias + at, &bias, left);
        for (int r = 0; r < ROWS; r++) write(y + r * ldy + at, w.bias ? out[v][r] + bias : out[v][r], left);
    }
}

template <int TILES>
static inline void all_rows(const float* x, int64_t ldx, const Weight& w, int64_t o, float* y, int64_t ldy, int64_t rows) {
    int64_t r = 0;
    if (w.scale) {
        constexpr int FEWER = WIDTH < LANES ? 1 : TILES;  // four rows of more sums have no room in narrow registers
        for (; r + 4 <= rows; r += 4)
            for (int t = 0; t < TILES; t += FEWER) integer_outputs<4, FEWER>(x + r * ldx, ldx, w, o + t * LANES, y + r * ldy, ldy);
        for (; r < rows; r++) integer_outputs<1, TILES>(x + r * ldx, ldx, w, o, y + r * ldy, ldy);
    } else {
        for (; r + 4 <= rows; r += 4) float_outputs<4, TILES * PARTS>(x + r * ldx, ldx, w, o, y + r * ldy, ldy);
        for (; r < rows; r++) float_outputs<1, TILES * PARTS>(x + r * ldx, ldx, w, o, y + r * ldy, ldy);
    }
}

// Several products of few rows at once: threads that wait for each other after every one of them lose more than they gain.
static void few_rows(const Job* jobs, int64_t count, int64_t rows) {
    constexpr int64_t WIDE = 4 * LANES;
    int64_t work = 0, blocks = 0;
    for (int64_t j = 0; j < count; j++) work += jobs[j].w.outputs * jobs[j].w.inputs, blocks += (jobs[j].w.outputs + WIDE - 1) / WIDE;
#pragma omp parallel for schedule(static) if (work > 16384)
    for (int64_t n = 0; n < blocks; n++) {
        const Job* job = jobs;
        int64_t o = n * WIDE;
        for (; o >= job->w.outputs; job++) o -= (job->w.outputs + WIDE - 1) / WIDE * WIDE;
        const auto& [x, ldx, w, y, ldy] = *job;
        int64_t to = o + WIDE < w.outputs ? o + WIDE : w.outputs;
        if (WIDTH == LANES && w.scale && to - o == WIDE) all_rows<4>(x, ldx, w, o, y, ldy, rows), o = to;  // there are registers for it
        for (; o + LANES < to; o += 2 * LANES) all_rows<2>(x, ldx, w, o, y, ldy, rows);
        for (; o < to; o += LANES) all_rows<1>(x, ldx, w, o, y, ldy, rows);
    }
}

static void many_rows(const float* x, int64_t ldx, const Weight& w, float* y, int64_t ldy, int64_t rows) {
    int64_t step = pass_of(w.inputs), blocks = (rows + ROW_BLOCK - 1) / ROW_BLOCK, columns = (blocks > 4 ? 16 : 4) * TILE_COLUMNS;
    int64_t panels = (w.outputs + TILE_COLUMNS - 1) / TILE_COLUMNS, chunks = (w.outputs + columns - 1) / columns;
    Floats packed(panels * TILE_COLUMNS * step);
#pragma omp parallel if (rows * w.outputs * w.inputs > 65536)
    {
        Floats lines((rows < ROW_BLOCK ? rows : ROW_BLOCK) * (step + LANES));
        for (int64_t from = 0; from < w.inputs; from += step) {
            int64_t depth = w.inputs - from < step ? w.inputs - from : step;
#pragma omp for schedule(static)
            for (int64_t n = 0; n < panels; n++) pack(w, n * TILE_COLUMNS, from, depth, packed.data() + n * TILE_COLUMNS * depth);
#pragma omp for collapse(2) schedule(dynamic, 1)
            for (int64_t b = 0; b < blocks; b++)
                for (int64_t c = 0; c < chunks; c++) {
                    int64_t first = b * ROW_BLOCK, count = rows - first < ROW_BLOCK ? rows - first : ROW_BLOCK, o = c * columns;
                    block_of_rows([=](int64_t r) { return x + (first + r) * ldx; }, w, packed.data() + o * depth, from, depth, lines.data(),
                                  y + first * ldy, ldy, count, o, o + columns < w.outputs ? o + columns : w.outputs);
                }
        }
    }
}

void linear(const Job* jobs, int64_t count, int64_t rows) {
    if (rows < MANY) return few_rows(jobs, count, rows);
    for (const Job* job = jobs; job < jobs + count; job++) many_rows(job->x, job->ldx, job->w, job->y, job->ldy, rows);
}

extern "C" {

// x [S, K] and y [S, O] in lines ldx and ldy apart; scale null for float weights, bias null for none.
void linear(const float* x, int64_t ldx, const void* values, const float* scale, const float* bias, float* y, int64_t ldy, int64_t rows,
            int64_t inputs, int64_t outputs) {
    Job job{x, ldx, Weight{values, scale, bias, inputs, outputs}, y, ldy};
    linear(&job, 1, rows);
}
}
