// Every row of a batch reads the next positions of its stream. The same kernels in the same order as the modules of
// `pmnet.model`, without the cost of a Python call for each; the bits are those of the modules.
//
// Shapes: B rows, T positions, S = B * T, D hidden size, H heads, E head width, W window, N slots, M phases, R read heads.
#include "kernels.h"
#include "phases.h"
#include "rows.h"

struct Model {  // _Model of pmnet/model/step.py
    int64_t rows, length, hidden, intermediate, heads, kv_heads, width, window, slots, size, read_heads, bits, cumulative, layers, period;
    int64_t buffer, offset;  // places of a row's buffer of keys; the first of the W - 1 before the new ones
    double theta;
    float eps, scale;
    int64_t positions() const { return rows * length; }
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

constexpr int64_t ALONE = 16384;  // numbers that one thread handles sooner than two

static Job job(const Floats& x, const Linear& w, Floats& y, int64_t inputs, int64_t outputs) {
    y.resize(x.size() / inputs * outputs);
    return {x.data(), inputs, Weight{w.values, w.scale, w.bias, inputs, outputs}, y.data(), outputs};
}

// Products of as many rows each, which do not need each other.
static void apply(std::initializer_list<Job> jobs, int64_t rows) { linear(jobs.begin(), jobs.size(), rows); }

static void norm(const float* x, const float* weight, Floats& y, const Model& m) {
    y.resize(m.positions() * m.hidden);
#pragma omp parallel for if (y.size() > ALONE)
    for (int64_t t = 0; t < m.positions(); t++) norm_row(x + t * m.hidden, weight, y.data() + t * m.hidden, m.hidden, m.eps);
}

static void add(float* x, const Floats& y) {
#pragma omp parallel for if (y.size() > ALONE)
    for (int64_t i = 0; i < y.size(); i++) x[i] += y.data()[i];
}

struct Places {  // of the positions of a step
    std::vector<int64_t> span;  // [B, T], positions seen
    Floats cosine, sine;        // [B, T, E]
};

static void attention(const Floats& h, const Layer& layer, const Model& m, const Places& places, Floats& out) {
    Floats q, k, v;
    int64_t line = m.kv_heads * m.width, first = m.offset + m.window - 1;
    apply({job(h, layer.query, q, m.hidden, m.heads * m.width), job(h, layer.key, k, m.hidden, line), job(h, layer.value, v, m.hidden, line)},
          m.positions());
#pragma omp parallel for if (q.size() > ALONE)
    for (int64_t t = 0; t < m.positions(); t++) {
        const float *c = places.cosine.data() + t * m.width, *s = places.sine.data() + t * m.width;
        for (int64_t i = t * m.heads; i < (t + 1) * m.heads; i++) {
            norm_row(q.data() + i * m.width, layer.query_norm, q.data() + i * m.width, m.width, m.eps);
            rotate_row(q.data() + i * m.width, c, s, q.data() + i * m.width, m.width, 1.f);
        }
        int64_t place = (t / m.length * m.buffer + first + t % m.length) * line;
        for (int64_t i = 0; i < line; i += m.width) {
            norm_row(k.data() + t * line + i, layer.key_norm, layer.keys + place + i, m.width, m.eps);
            rotate_row(layer.keys + place + i, c, s, layer.keys + place + i, m.width, 1.f);
        }
        memcpy(layer.values + place, v.data() + t * line, line * sizeof(float));
    }
    Floats mixed(q.size());
    attend(q.data(), layer.keys + m.offset * line, layer.values + m.offset * line, places.span.data(), mixed.data(),
           Shape{m.rows, m.length, m.heads, m.kv_heads, m.width, m.window, m.rows, m.scale, m.buffer});
    apply({job(mixed, layer.out, out, m.heads * m.width, m.hidden)}, m.positions());
}

// Turns the memory, adds to the field, finds the geometry that reads see and the child groups.
static void write(const Floats& h, const Layer& layer, const Level& level, bool top, Floats& field, Floats& geometry, int64_t* groups, const Model& m) {
    Floats q, v, raw, weights(m.positions() * m.slots), angle(m.positions() * m.slots * m.size);
    geometry.resize(m.positions() * m.slots * 2 * m.size);
    geometries(top ? nullptr : field.data(), level.anchors, groups, geometry.data(), m.positions(), m.slots, m.size);
    apply({job(h, layer.write_query, q, m.hidden, m.size), job(h, layer.write_value, v, m.hidden, m.size)}, m.positions());
    const Linear& w = layer.write_keys;
    read_slots(q.data(), geometry.data(), Weight{w.values, w.scale, w.bias, 2 * m.size, m.size}, weights.data(), nullptr, m.positions(), m.slots, 1,
               m.size);
    apply({job(v, layer.write_out, raw, m.size, m.size)}, m.positions());
    turn(weights.data(), raw.data(), groups, nullptr, nullptr, level.memory, angle.data(),
         Scan{m.rows, m.length, level.groups, m.slots, m.size, m.bits, m.cumulative});
    if (top)
        memcpy(field.data(), angle.data(), angle.size() * sizeof(float));
    else
        add(field.data(), angle);
    geometries(field.data(), level.anchors, groups, geometry.data(), m.positions(), m.slots, m.size);
    for (int64_t t = 0; t < m.positions(); t++) {
        const float* p = weights.data() + t * m.slots;
        int64_t best = 0;
        for (int64_t n = 1; n < m.slots; n++)
            if (p[n] > p[best]) best = n;
        groups[t] = m.slots * groups[t] + best;
    }
}

static void read(const Floats& h, const Layer& layer, const Floats& geometry, const Model& m, Floats& out) {
    int64_t wide = m.read_heads * m.size;
    Floats q, values(m.positions() * wide), weights(m.positions() * m.slots * m.read_heads);
    apply({job(h, layer.read_query, q, m.hidden, wide)}, m.positions());
    const Linear& w = layer.read_keys;
    read_slots(q.data(), geometry.data(), Weight{w.values, w.scale, w.bias, 2 * m.size, 2 * wide}, weights.data(), values.data(), m.positions(),
               m.slots, m.read_heads, m.size);
    apply({job(values, layer.read_out, out, wide, m.hidden)}, m.positions());
}

static void mlp(const Floats& h, const Layer& layer, const Model& m, Floats& out) {
    Floats gate, up;
    apply({job(h, layer.gate, gate, m.hidden, m.intermediate), job(h, layer.up, up, m.hidden, m.intermediate)}, m.positions());
    silu_product(gate.data(), up.data(), gate.data(), gate.size());
    apply({job(gate, layer.down, out, m.intermediate, m.hidden)}, m.positions());
}

extern "C" {

// x [B, T, D], the embedding, becomes the normed output of the last layer. The counters [B] of the cache are advanced:
// positions read, positions of the document read, rotary position.
void step(float* x, int64_t* seen, int64_t* in_document, int64_t* position, const Layer* layers, const Level* levels, const float* final_norm,
          const Model* model) {
    const Model& m = *model;
    Places places;
    places.span.resize(m.positions()), places.cosine.resize(m.positions() * m.width), places.sine.resize(m.positions() * m.width);
#pragma omp parallel for if (m.positions() > 16)
    for (int64_t t = 0; t < m.positions(); t++) {
        int64_t b = t / m.length, i = t % m.length, read = in_document[b] + i + 1;
        rotary_row(position[b] + i, m.width, m.theta, places.cosine.data() + t * m.width, places.sine.data() + t * m.width);
        places.span[t] = read < 1 ? 1 : read < m.window ? read : m.window;
    }
    for (int64_t b = 0; b < m.rows; b++) seen[b] += m.length, in_document[b] += m.length, position[b] += m.length;
    Floats h, y, geometry, field(m.positions() * m.slots * m.size);
    std::vector<int64_t> groups(m.positions());
    for (int64_t i = 0; i < m.layers; i++) {
        const Layer& layer = layers[i];
        norm(x, layer.input_norm, h, m);
        attention(h, layer, m, places, y);
        add(x, y);
        if (i % m.period == 0) {
            norm(x, layer.write_norm, h, m);
            write(h, layer, levels[i / m.period], i == 0, field, geometry, groups.data(), m);
        }
        norm(x, layer.read_norm, h, m);
        read(h, layer, geometry, m, y);
        add(x, y);
        norm(x, layer.mlp_norm, h, m);
        mlp(h, layer, m, y);
        add(x, y);
    }
    norm(x, final_norm, h, m);
    memcpy(x, h.data(), h.size() * sizeof(float));
}
}
