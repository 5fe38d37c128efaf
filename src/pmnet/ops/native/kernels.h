// Kernels that more than one file of the native code uses.
#pragma once
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>
#include "vector.h"

constexpr int64_t DEPTH = 384;  // longest sum of one pass, MAX_DEPTH of ops/linear.py
constexpr int64_t BLOCK = 64;   // queries that attention handles together

// Zeros for one thread to work on, aligned to whole vectors: a load across two cache lines costs as much as two.
class Scratch {
    std::vector<v16> lines;

   public:
    explicit Scratch(int64_t count = 0) : lines((count + LANES - 1) / LANES) {}
    float* data() { return (float*)lines.data(); }
};

// The same without the zeros: to be written before it is read.
class Floats {
    float* start = nullptr;
    int64_t count = 0;

   public:
    explicit Floats(int64_t size = 0) { resize(size); }
    Floats(const Floats&) = delete;
    ~Floats() { free(start); }
    void resize(int64_t size) {
        if (size == count) return;
        free(start);
        start = (float*)aligned_alloc(64, (size + LANES) / LANES * 64), count = size;
        if (!start) fputs("pmnet: not enough memory\n", stderr), abort();
    }
    float* data() { return start; }
    const float* data() const { return start; }
    int64_t size() const { return count; }
};

struct Weight {
    const void* values;  // float [O, K], or int8 panels [O / 16, K, 16] if there is a scale
    const float* scale;  // [O] or null
    const float* bias;   // [O] or null
    int64_t inputs, outputs;
};

// y [S, O] = x W^T + b; lines of x and y start ldx and ldy apart
struct Job {
    const float* x;
    int64_t ldx;
    Weight w;
    float* y;
    int64_t ldy;
};

// `count` products of as many rows each, which do not need each other
void linear(const Job* jobs, int64_t count, int64_t rows);

// y = silu(gate) * up, which may be in the place of `gate`
extern "C" void silu_product(const float* gate, const float* up, float* y, int64_t count);

// What the heads see of the slots: query [P, R, M], geometry [P, N, 2M]; w has the keys of all heads, then their values.
// slot_weights is [P, N, R], values [P, R M]; values may be null: then w has the keys alone, and slots are only weighed.
void read_slots(const float* query, const float* geometry, const Weight& w, float* slot_weights, float* values, int64_t positions, int64_t slots,
                int64_t heads, int64_t size);

struct Shape {
    int64_t batch, length, heads, kv_heads, width, window, span_rows;
    float scale;
    int64_t buffer;  // places of a row's buffer of keys
    int64_t padded() const { return (width + LANES - 1) / LANES * LANES; }
    int64_t columns() const { return ((length < BLOCK ? length : BLOCK) + window + 2) / LANES * LANES + 3 * LANES; }  // and slack
};

// window_attention with a buffer of `s.buffer` places a row
void attend(const float* query, const float* keys, const float* values, const int64_t* span, float* out, const Shape& s);

struct Scan {
    int64_t batch, length, groups, slots, size, bits, cumulative;
};
// phase_write
void turn(const float* weights, const float* raw, const int64_t* groups, const int64_t* documents, const bool* valid, int32_t* memory,
          float* angle, const Scan& s);
