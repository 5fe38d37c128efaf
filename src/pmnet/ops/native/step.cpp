// One decode step: every row of a batch reads one position. The same kernels in the same order as the modules of
// `pmnet.model`, without the cost of a Python call for each; a step has the bits of a forward pass over one position.
//
// Shapes: B rows, D hidden size, H heads, K key/value heads, E head width, W window, N slots, M phases, R read heads.
#include "kernels.h"
#include "phases.h"
#include "rows.h"

struct Model {  // _Model of pmnet/model/step.py
    int64_t rows, hidden, intermediate, heads, kv_heads, width, window, slots, size, read_heads, bits, cumulative, layers, period;
    int64_t buffer, offset;  // places of a row's buffer of keys; the first of the W places seen
    double theta;
    float eps, scale;
};

struct Linear {
    const void* values;
    const float *scale, *bias;
};

struct Layer {  // in the order of step.py
    const float *input_norm, *query_norm, *key_norm, *mlp_norm, *read_norm, *write_norm;
    Linear query, key, value, out, gate, up, down, read_query, read_keys, read_out, write_query, write_keys, write_value, write_out;
    float *keys, *values;  // [B, buffer, K, E]
};

struct Level {
    const float* anchors;  // [G, N, M]
    int32_t* memory;       // [B, G, N, M]
    int64_t groups;
};

using Floats = std::vector<float>;

static void apply(const Floats& x, const Linear& w, Floats& y, int64_t inputs, int64_t outputs) {
    y.resize(x.size() / inputs * outputs);
    linear(x.data(), inputs, Weight{w.values, w.scale, w.bias, inputs, outputs}, y.data(), outputs, x.size() / inputs);
}

static Floats normed(const float* x, const float* weight, const Model& m) {
    Floats y(m.rows * m.hidden);
    for (int64_t b = 0; b < m.rows; b++) norm_row(x + b * m.hidden, weight, y.data() + b * m.hidden, m.hidden, m.eps);
    return y;
}

static void add(float* x, const Floats& y) {
    for (size_t i = 0; i < y.size(); i++) x[i] += y[i];
}

static Floats attention(const Floats& h, const Layer& layer, const Model& m, const float* cosine, const float* sine, const int64_t* span) {
    Floats q, k, v, y;
    int64_t line = m.kv_heads * m.width;
    apply(h, layer.query, q, m.hidden, m.heads * m.width);
    apply(h, layer.key, k, m.hidden, line);
    apply(h, layer.value, v, m.hidden, line);
    for (int64_t b = 0; b < m.rows; b++) {
        const float *c = cosine + b * m.width, *s = sine + b * m.width;
        for (int64_t i = b * m.heads; i < (b + 1) * m.heads; i++) {
            norm_row(q.data() + i * m.width, layer.query_norm, q.data() + i * m.width, m.width, m.eps);
            rotate_row(q.data() + i * m.width, c, s, q.data() + i * m.width, m.width, 1.f);
        }
        float* key = layer.keys + (b * m.buffer + m.offset + m.window - 1) * line;
        for (int64_t i = 0; i < m.kv_heads; i++) {
            norm_row(k.data() + b * line + i * m.width, layer.key_norm, key + i * m.width, m.width, m.eps);
            rotate_row(key + i * m.width, c, s, key + i * m.width, m.width, 1.f);
        }
        memcpy(layer.values + (key - layer.keys), v.data() + b * line, line * sizeof(float));
    }
    y.resize(q.size());
    attend(q.data(), layer.keys + m.offset * line, layer.values + m.offset * line, span, y.data(),
           Shape{m.rows, 1, m.heads, m.kv_heads, m.width, m.window, m.rows, m.scale, m.buffer});
    apply(y, layer.out, q, m.heads * m.width, m.hidden);
    return q;
}

static void geometries(const Floats& field, bool zero, const Level& level, const int64_t* groups, Floats& out, const Model& m) {
    out.resize(m.rows * m.slots * 2 * m.size);
    for (int64_t i = 0; i < m.rows * m.slots; i++)
        geometry_row(zero ? nullptr : field.data() + i * m.size, level.anchors + (groups[i / m.slots] * m.slots + i % m.slots) * m.size,
                     out.data() + i * 2 * m.size, m.size);
}

// Turns the memory, adds to the field, finds the geometry that reads see and the child groups.
static void write(const Floats& h, const Layer& layer, const Level& level, bool top, Floats& field, Floats& geometry, int64_t* groups, int64_t* children,
                  const Model& m) {
    Floats q, k, v, raw, weights(m.rows * m.slots), angle(m.rows * m.slots * m.size);
    geometries(field, top, level, groups, geometry, m);
    apply(h, layer.write_query, q, m.hidden, m.size);
    apply(geometry, layer.write_keys, k, 2 * m.size, m.size);
    for (int64_t b = 0; b < m.rows; b++)
        address_head(q.data() + b * m.size, k.data() + b * m.slots * m.size, nullptr, m.size, m.slots, m.size, weights.data() + b * m.slots, 1);
    apply(h, layer.write_value, v, m.hidden, m.size);
    apply(v, layer.write_out, raw, m.size, m.size);
    turn(weights.data(), raw.data(), groups, nullptr, nullptr, level.memory, angle.data(),
         Scan{m.rows, 1, level.groups, m.slots, m.size, m.bits, m.cumulative});
    for (size_t i = 0; i < angle.size(); i++) field[i] = top ? angle[i] : field[i] + angle[i];
    geometries(field, false, level, groups, geometry, m);
    for (int64_t b = 0; b < m.rows; b++) {
        int64_t best = 0;
        for (int64_t n = 1; n < m.slots; n++)
            if (weights[b * m.slots + n] > weights[b * m.slots + best]) best = n;
        children[b] = m.slots * groups[b] + best;
    }
}

static Linear rows_from(const Linear& w, int64_t row, int64_t inputs) {  // `row` is a multiple of 16 where there is a scale
    const char* values = (const char*)w.values + row * inputs * (w.scale ? 1 : sizeof(float));
    return Linear{values, w.scale ? w.scale + row : nullptr, w.bias ? w.bias + row : nullptr};
}

static Floats read(const Floats& h, const Layer& layer, const Floats& geometry, const Model& m) {
    Floats q, k, y;
    int64_t wide = m.read_heads * m.size;
    apply(h, layer.read_query, q, m.hidden, wide);
    apply(geometry, layer.read_keys, k, 2 * m.size, wide);
    Floats mixed(m.rows * m.read_heads * 2 * m.size), values(m.rows * wide), weights(m.slots * m.read_heads);
    for (int64_t b = 0; b < m.rows; b++)
#pragma omp parallel for if (wide > 1024)
        for (int64_t r = 0; r < m.read_heads; r++) {
            address_head(q.data() + b * wide + r * m.size, k.data() + b * m.slots * wide + r * m.size, nullptr, wide, m.slots, m.size, weights.data() + r, m.read_heads);
            mix_head(weights.data() + r, m.read_heads, geometry.data() + b * m.slots * 2 * m.size, m.slots, 2 * m.size,
                     mixed.data() + (b * m.read_heads + r) * 2 * m.size);
        }
    for (int64_t r = 0; r < m.read_heads; r++) {
        Linear w = rows_from(layer.read_keys, wide + r * m.size, 2 * m.size);
        linear(mixed.data() + r * 2 * m.size, m.read_heads * 2 * m.size, Weight{w.values, w.scale, w.bias, 2 * m.size, m.size},
                 values.data() + r * m.size, wide, m.rows);
    }
    apply(values, layer.read_out, y, wide, m.hidden);
    return y;
}

static Floats mlp(const Floats& h, const Layer& layer, const Model& m) {
    Floats gate, up, y;
    apply(h, layer.gate, gate, m.hidden, m.intermediate);
    apply(h, layer.up, up, m.hidden, m.intermediate);
    for (int64_t i = 0, count = gate.size(); i < count; i += LANES)
        store(gate.data() + i, silu(load(gate.data() + i, count - i)) * load(up.data() + i, count - i), count - i);
    apply(gate, layer.down, y, m.intermediate, m.hidden);
    return y;
}

extern "C" {

// x [B, D], the embedding, becomes the normed output of the last layer. The counters [B] of the cache are advanced:
// positions read, positions of the document read, rotary position.
void decode_step(float* x, int64_t* seen, int64_t* in_document, int64_t* position, const Layer* layers, const Level* levels,
                 const float* final_norm, const Model* model) {
    const Model& m = *model;
    Floats field(m.rows * m.slots * m.size), geometry, cosine(m.rows * m.width), sine(m.rows * m.width);
    std::vector<int64_t> groups(m.rows), children(m.rows), span(m.rows);
    for (int64_t b = 0; b < m.rows; b++) {
        rotary_row(position[b]++, m.width, m.theta, cosine.data() + b * m.width, sine.data() + b * m.width);
        seen[b]++;
        span[b] = ++in_document[b] < m.window ? in_document[b] : m.window;
    }
    for (int64_t i = 0; i < m.layers; i++) {
        const Layer& layer = layers[i];
        add(x, attention(normed(x, layer.input_norm, m), layer, m, cosine.data(), sine.data(), span.data()));
        if (i % m.period == 0) {
            groups = children;
            write(normed(x, layer.write_norm, m), layer, levels[i / m.period], i == 0, field, geometry, groups.data(), children.data(), m);
        }
        add(x, read(normed(x, layer.read_norm, m), layer, geometry, m));
        add(x, mlp(normed(x, layer.mlp_norm, m), layer, m));
    }
    for (int64_t b = 0; b < m.rows; b++) norm_row(x + b * m.hidden, final_norm, x + b * m.hidden, m.hidden, m.eps);
}
}
