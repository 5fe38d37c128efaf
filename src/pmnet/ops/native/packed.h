// Products of many rows with weights that were packed: panels of TILE_COLUMNS outputs, so that a tile reads them in line.
#pragma once
#include "kernels.h"
#include "products.h"

constexpr int64_t ROW_BLOCK = 192;  // rows of x that stay in the second cache, a multiple of TILE_ROWS

// inputs of one pass: the fewest passes of at most DEPTH, evenly long, in multiples of 16
static inline int64_t pass_of(int64_t inputs) {
    int64_t passes = (inputs + DEPTH - 1) / DEPTH;
    return (inputs + LANES * passes - 1) / (LANES * passes) * LANES;
}

// packed[k][lane] = w[o + lane][from + k] for TILE_COLUMNS outputs, zero beyond the last.
static inline void pack(const Weight& w, int64_t o, int64_t from, int64_t depth, float* packed) {
    for (int j = 0; j < TILE_VECTORS; j++)
        for (int64_t k = 0; k < depth; k += WIDTH) {
            int64_t first = o + j * WIDTH, count = w.outputs - first, deep = depth - k < WIDTH ? depth - k : WIDTH;
            vf block[WIDTH] = {};
            if (w.scale && count > 0) {
                vf scale;
                read(w.scale + first, &scale, count);
                const int8_t* at = (const int8_t*)w.values + first / LANES * LANES * w.inputs + (from + k) * LANES + first % LANES;
                for (int i = 0; i < deep; i++) widen(at + i * LANES, &block[i]), block[i] *= scale;
            } else {
                const float* at = (const float*)w.values + first * w.inputs + from + k;
                for (int i = 0; i < WIDTH && i < count; i++) read(at + i * w.inputs, &block[i], deep);
                transpose(block);
            }
            for (int i = 0; i < deep; i++) write(packed + (k + i) * TILE_COLUMNS + j * WIDTH, block[i]);
        }
}

// One pass for `count` rows, row(0), row(1), ..., and the outputs o .. end - 1 of some panels; `lines` has room for the rows.
template <class Row>
static inline void block_of_rows(Row row, const Weight& w, const float* packed, int64_t from, int64_t depth, float* lines, float* y,
                          int64_t ldy, int64_t count, int64_t o, int64_t end) {
    const Product p{depth + LANES, 1, TILE_COLUMNS, ldy, depth, from > 0};
    for (int64_t r = 0; r < count; r++)  // lines that lie a power of two apart would share few places of the cache
        memcpy(lines + r * p.row_a, row(r) + from, depth * sizeof(float));
    for (; o < end; o += TILE_COLUMNS, packed += TILE_COLUMNS * depth) {
        const float* bias = w.bias && from + depth == w.inputs ? w.bias + o : nullptr;
        int64_t columns = w.outputs - o;
        if (columns <= WIDTH)
            panel<1>(p, count, lines, packed, y + o, columns, bias);
        else if (columns <= 2 * WIDTH)
            panel<2>(p, count, lines, packed, y + o, columns, bias);
        else
            panel<TILE_VECTORS>(p, count, lines, packed, y + o, columns, bias);
    }
}
