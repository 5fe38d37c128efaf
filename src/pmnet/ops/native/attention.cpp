// Causal sliding-window attention, forward and backward.
//
// Shapes: B, T queries, H query heads, K key/value heads, E head width (padded to a multiple of 16 inside), W window.
// Buffers of keys and values hold the W - 1 positions before the chunk, then the T new ones: query t sees buffer places
// t .. t + W - 1, of these the last span[t]. Weights outside are exactly zero and add exactly nothing, so results do
// not depend on how queries are grouped into blocks.
#include "kernels.h"
#include "products.h"

constexpr int64_t TILE = TILE_ROWS;  // queries of one product

// panel[e][j] = rows[j][e]
static void transpose_rows(const float* rows, int64_t count, int64_t stride, int64_t width, float* panel, int64_t columns) {
    for (int64_t j = 0; j < count; j += WIDTH)
        for (int64_t e = 0; e < width; e += WIDTH) {
            vf block[WIDTH] = {};
            for (int i = 0; i < WIDTH && j + i < count; i++) read(rows + (j + i) * stride + e, &block[i], width - e);
            transpose(block);
            for (int i = 0; i < WIDTH && e + i < width; i++) write(panel + (e + i) * columns + j, block[i]);
        }
}
// packed[j][e] = rows[j][e], e padded with zeros
static void copy_rows(const float* rows, int64_t count, int64_t stride, int64_t width, float* packed, int64_t padded) {
    for (int64_t j = 0; j < count; j++) memcpy(packed + j * padded, rows + j * stride, width * sizeof(float));
}

// Softmax of the W scores of a query that see something; zero elsewhere in the row's tile range [begin, end).
static void window_softmax(float* row, int64_t begin, int64_t end, int64_t first, int64_t window, int64_t span, float scale) {
    for (int64_t j = begin; j < first + window - span; j++) row[j] = 0;
    for (int64_t j = first + window; j < end; j++) row[j] = 0;
    float* s = row + first + window - span;
    v16 top = splat(-__builtin_inff());
    for (int64_t j = 0; j < span; j += LANES) {
        top = greater(top, keep(load(s + j, span - j), span - j, -__builtin_inff()));
    }
    v16 total{}, shift = splat(-greatest(top) * scale), factor = splat(scale);
    for (int64_t j = 0; j < span; j += LANES) {
        v16 w = keep(exp(fma(load(s + j, span - j), factor, shift)), span - j, 0.f);
        total += w;
        store(s + j, w, span - j);
    }
    v16 inverse = splat(1.f / sum(total));
    for (int64_t j = 0; j < span; j += LANES) store(s + j, load(s + j, span - j) * inverse, span - j);
}

struct Desk {  // one thread's working set for one head and one block of queries
    Scratch keys_t, keys, values, values_t, query, weights, out, slopes, upstream;
    Desk(const Shape& s, bool backward)
        : keys_t(s.padded() * s.columns()), values(s.columns() * s.padded()), query(BLOCK * s.padded()),
          weights(TILE * s.columns()), out(s.columns() * s.padded()) {
        if (!backward) return;
        keys = values, values_t = keys_t, slopes = weights, upstream = query;
    }
};

// The queries of one block for one key head; `keys` and `values` point at the first place the block sees.
static void attend_block(const Shape& s, Desk& w, const float* query, const float* keys, const float* values, const int64_t* span,
                         float* out, int64_t count) {
    int64_t padded = s.padded(), columns = s.columns(), stride = s.kv_heads * s.width, step = s.heads * s.width;
    transpose_rows(keys, count + s.window - 1, stride, s.width, w.keys_t.data(), columns);
    copy_rows(values, count + s.window - 1, stride, s.width, w.values.data(), padded);
    for (int64_t h = 0; h < s.heads / s.kv_heads; h++)
        for (int64_t t = 0; t < count; t += TILE) {
            int64_t rows = count - t < TILE ? count - t : TILE, end = rows + s.window - 1, at = t * step + h * s.width;
            int64_t wide = (end + LANES - 1) / LANES * LANES;
            strip(Product{step, 1, columns, columns, s.width, false}, rows, query + at, w.keys_t.data() + t, w.weights.data(), wide);
            for (int64_t i = 0; i < rows; i++)
                window_softmax(w.weights.data() + i * columns, 0, end, i, s.window, span[t + i], s.scale);
            strip(Product{columns, 1, padded, padded, end, false}, rows, w.weights.data(), w.values.data() + t * padded, w.out.data(), padded);
            for (int64_t i = 0; i < rows; i++) memcpy(out + at + i * step, w.out.data() + i * padded, s.width * sizeof(float));
        }
}

// One query of one head, of whole vectors: keys and values stay where they are.
static void attend_one(const Shape& s, const float* query, const float* keys, const float* values, int64_t span, float* weights, float* out) {
    int64_t stride = s.kv_heads * s.width, before = (s.window - span) * stride;
    for (int64_t j = 0; j < span; j += WIDTH) {
        vf total{};
        for (int64_t e = 0; e < s.width; e += WIDTH) add_floats<1>(query + e, 0, keys + before + j * stride + e, stride, span - j, WIDTH, &total);
        write(weights + j, total, span - j);
    }
    window_softmax(weights, 0, span, 0, span, span, s.scale);
    strip(Product{span, 1, stride, s.width, span, false}, 1, weights, values + before, out, s.width);
}

static void attend_singly(const float* query, const float* keys, const float* values, const int64_t* span, float* out, const Shape& s) {
    int64_t group = s.heads / s.kv_heads;
#pragma omp parallel if (s.batch * s.heads * s.window > 1024)
    {
        Floats weights(s.window);
#pragma omp for collapse(2)
        for (int64_t b = 0; b < s.batch; b++)
            for (int64_t h = 0; h < s.heads; h++) {
                int64_t at = (b * s.heads + h) * s.width, from = (b * s.buffer * s.kv_heads + h / group) * s.width;
                attend_one(s, query + at, keys + from, values + from, span[b % s.span_rows], weights.data(), out + at);
            }
    }
}

void attend(const float* query, const float* keys, const float* values, const int64_t* span, float* out, const Shape& s) {
    if (s.length == 1 && s.width % LANES == 0) return attend_singly(query, keys, values, span, out, s);
    int64_t blocks = (s.length + BLOCK - 1) / BLOCK, group = s.heads / s.kv_heads;
#pragma omp parallel if (s.batch * s.heads * s.length * s.window > 1024)
    {
        Desk w(s, false);
#pragma omp for collapse(3)
        for (int64_t b = 0; b < s.batch; b++)
            for (int64_t n = 0; n < blocks; n++)
                for (int64_t k = 0; k < s.kv_heads; k++) {
                    int64_t start = n * BLOCK, count = s.length - start < BLOCK ? s.length - start : BLOCK;
                    int64_t from = ((b * s.buffer + start) * s.kv_heads + k) * s.width;
                    int64_t at = ((b * s.length + start) * s.heads + k * group) * s.width;
                    attend_block(s, w, query + at, keys + from, values + from, span + b % s.span_rows * s.length + start, out + at, count);
                }
    }
}

extern "C" {

// query, out [B, T, H, E]; keys, values [B, W - 1 + T, K, E]; span [span_rows = 1 or B, T] in 1 .. W.
void window_attention(const float* query, const float* keys, const float* values, const int64_t* span, float* out, int64_t batch, int64_t length,
                      int64_t heads, int64_t kv_heads, int64_t width, int64_t window, int64_t span_rows, float scale) {
    attend(query, keys, values, span, out, Shape{batch, length, heads, kv_heads, width, window, span_rows, scale, window - 1 + length});
}

// Gradients; grad_keys and grad_values start as zeros. One (row, key head) belongs to one thread.
void window_attention_backward(
    const float* query, const float* keys, const float* values, const int64_t* span, const float* upstream,
    float* grad_query, float* grad_keys, float* grad_values, int64_t batch, int64_t length, int64_t heads,
    int64_t kv_heads, int64_t width, int64_t window, int64_t span_rows, float scale) {
    const Shape s{batch, length, heads, kv_heads, width, window, span_rows, scale, window - 1 + length};
    int64_t padded = s.padded(), columns = s.columns(), group = s.heads / s.kv_heads, stride = s.kv_heads * s.width;
#pragma omp parallel
    {
        Desk w(s, true);
        Scratch sum_keys(columns * padded), sum_values(columns * padded);
#pragma omp for collapse(2)
        for (int64_t b = 0; b < s.batch; b++)
            for (int64_t k = 0; k < s.kv_heads; k++)
                for (int64_t start = 0; start < s.length; start += BLOCK) {
                    int64_t count = s.length - start < BLOCK ? s.length - start : BLOCK, seen = count + s.window - 1;
                    int64_t from = (b * s.buffer + start) * stride + k * s.width;
                    transpose_rows(keys + from, seen, stride, s.width, w.keys_t.data(), columns);
                    transpose_rows(values + from, seen, stride, s.width, w.values_t.data(), columns);
                    copy_rows(keys + from, seen, stride, s.width, w.keys.data(), padded);
                    memset(sum_keys.data(), 0, columns * padded * sizeof(float));
                    memset(sum_values.data(), 0, columns * padded * sizeof(float));
                    for (int64_t h = k * group; h < (k + 1) * group; h++)
                        for (int64_t t = 0; t < count; t += TILE) {
                            int64_t rows = count - t < TILE ? count - t : TILE, end = rows + s.window - 1;
                            int64_t wide = (end + LANES - 1) / LANES * LANES, step = s.heads * s.width;
                            int64_t at = ((b * s.length + start + t) * s.heads + h) * s.width;
                            float *p = w.weights.data(), *d = w.slopes.data();
                            strip(Product{step, 1, columns, columns, s.width, false}, rows, query + at, w.keys_t.data() + t, p, wide);
                            strip(Product{step, 1, columns, columns, s.width, false}, rows, upstream + at, w.values_t.data() + t, d, wide);
                            for (int64_t i = 0; i < rows; i++) {
                                float *row = p + i * columns, *slope = d + i * columns;
                                window_softmax(row, 0, wide, i, s.window, span[b % s.span_rows * s.length + start + t + i], s.scale);
                                v16 dot{};
                                for (int64_t j = 0; j < wide; j += LANES) dot = fma(load(row + j), load(slope + j), dot);
                                v16 mean = splat(sum(dot)), scale = splat(s.scale);
                                for (int64_t j = 0; j < wide; j += LANES)
                                    store(slope + j, load(row + j) * (load(slope + j) - mean) * scale);
                            }
                            copy_rows(query + at, rows, step, s.width, w.query.data(), padded);
                            copy_rows(upstream + at, rows, step, s.width, w.upstream.data(), padded);
                            strip(Product{1, columns, padded, padded, rows, true}, end, p, w.upstream.data(), sum_values.data() + t * padded, padded);
                            strip(Product{1, columns, padded, padded, rows, true}, end, d, w.query.data(), sum_keys.data() + t * padded, padded);
                            strip(Product{columns, 1, padded, padded, end, false}, rows, d, w.keys.data() + t * padded, w.out.data(), padded);
                            for (int64_t i = 0; i < rows; i++) memcpy(grad_query + at + i * step, w.out.data() + i * padded, s.width * sizeof(float));
                        }
                    for (int64_t j = 0; j < seen; j++)
                        for (int64_t e = 0; e < s.width; e++) {
                            grad_keys[from + j * stride + e] += sum_keys.data()[j * padded + e];
                            grad_values[from + j * stride + e] += sum_values.data()[j * padded + e];
                        }
                }
    }
}
}
