// Phases: agreement, mixing of slots, geometry, rounding. Shapes as in memory.cpp.
#pragma once
#include "vector.h"

constexpr int MOST_SLOTS = 1024;

static inline void softmax(float* x, int64_t count) {
    float top = x[0], total = 0;
    for (int64_t n = 1; n < count; n++) top = x[n] > top ? x[n] : top;
    for (int64_t n = 0; n < count; n += LANES) {
        v16 e = exp(load(x + n, count - n) - splat(top));
        store(x + n, e, count - n);
    }
    for (int64_t n = 0; n < count; n++) total += x[n];
    for (int64_t n = 0; n < count; n++) x[n] /= total;
}

// The angle, in half turns, of a raw value; `bias` may be null.
static inline v16 half_turns(const float* raw, const float* bias, int64_t at, int64_t left) {
    v16 x = load(raw + at, left);
    return tanh(bias ? x + load(bias + at, left) : x);
}

// Weights a_n = softmax_n(sum_m cos(q_m - k_nm) / sqrt(M)) of one position and head; key(n, m, left) are the angles of
// slot n from m on, in half turns.
template <class Key>
static inline void address_head(const float* query, Key key, int64_t slots, int64_t size, float* weights, int64_t step) {
    float scores[MOST_SLOTS];
    v16 total[MOST_SLOTS];
    for (int64_t n = 0; n < slots; n++) total[n] = v16{};
    for (int64_t m = 0; m < size; m += LANES) {
        int64_t left = size - m;
        v16 q = tanh(load(query + m, left));
        for (int64_t n = 0; n < slots; n++) {
            total[n] += keep(cosine_pi(q - key(n, m, left)), left, 0.f);
        }
    }
    float scale = 1.f / __builtin_sqrtf((float)size);
    for (int64_t n = 0; n < slots; n++) scores[n] = sum(total[n]) * scale;
    softmax(scores, slots);
    for (int64_t n = 0; n < slots; n++) weights[n * step] = scores[n];
}

// The same with raw keys, that of slot n at keys + n * stride.
static inline void address_head(const float* query, const float* keys, int64_t stride, int64_t slots, int64_t size, float* weights, int64_t step) {
    address_head(query, [=](int64_t n, int64_t m, int64_t left) { return tanh(load(keys + n * stride + m, left)); }, slots, size, weights, step);
}

static inline void mix_head(const float* weights, int64_t step, const float* geometry, int64_t slots, int64_t width, float* mixed) {
    for (int64_t c = 0; c < width; c += LANES) {
        v16 total{};
        for (int64_t n = 0; n < slots; n++) total = fma(splat(weights[n * step]), load(geometry + n * width + c, width - c), total);
        store(mixed + c, total, width - c);
    }
}

// [sin ; cos] of field + anchor for one slot; field may be null (zero)
static inline void geometry_row(const float* field, const float* anchor, float* out, int64_t size) {
    for (int64_t m = 0; m < size; m += LANES) {
        v16 x = load(anchor + m, size - m), s, c;
        if (field) x += load(field + m, size - m);
        sine_cosine(x, &s, &c);
        store(out + m, s, size - m);
        store(out + size + m, c, size - m);
    }
}

static inline bool alike(const float* a, const float* b, int64_t count) { return memcmp(a, b, count * sizeof(float)) == 0; }

// The same for all slots of `positions` positions [P, N, .]: slots that nothing has turned since the position before,
// in the same group, are copied from there.
static inline void geometries(const float* field, const float* anchors, const int64_t* groups, float* out, int64_t positions, int64_t slots,
                              int64_t size) {
    constexpr int64_t TOGETHER = 32;
    int64_t line = slots * size;
#pragma omp parallel for if (positions * line > 2048)
    for (int64_t start = 0; start < positions; start += TOGETHER)
        for (int64_t t = start; t < positions && t < start + TOGETHER; t++)
            for (int64_t n = 0; n < slots; n++) {
                const float* turned = field ? field + t * line + n * size : nullptr;
                float* row = out + 2 * (t * line + n * size);
                if (t > start && groups[t] == groups[t - 1] && (!field || alike(turned, turned - line, size)))
                    memcpy(row, row - 2 * line, 2 * size * sizeof(float));
                else
                    geometry_row(turned, anchors + groups[t] * line + n * size, row, size);
            }
}

// Half a register of floats, as many doubles, and integers of both sizes.
constexpr int HALF_WIDTH = WIDTH / 2;
typedef float hf __attribute__((vector_size(2 * WIDTH)));
typedef int32_t hi __attribute__((vector_size(2 * WIDTH)));
typedef double hd __attribute__((vector_size(4 * WIDTH)));
typedef int64_t hl __attribute__((vector_size(4 * WIDTH)));

// Rotations round(p * theta / 2pi * 2^bits), in turns of 2^32, of a multiple of HALF_WIDTH angles; what is not finite is zero.
static inline void turns(float weight, const float* theta, int64_t count, int64_t bits, int32_t* delta) {
    const double steps = __builtin_ldexp(1.0, bits) / 6.283185307179586476925, turn = __builtin_ldexp(1.0, bits), part = __builtin_ldexp(1.0, -bits);
    const hd integer = 6755399441055744.0 - hd{};  // 1.5 * 2^52: a sum with it is rounded to an integer, which its last bits are
    const int shift = 32 - bits;
    for (int64_t m = 0; m < count; m += HALF_WIDTH) {
        hf angle;
        memcpy(&angle, theta + m, sizeof angle);
        hd x = __builtin_convertvector(angle * weight, hd) * steps;
        x = (x < 9e15 - hd{}) & (x > hd{} - 9e15) ? x : hd{};
        x -= ((x * part + integer) - integer) * turn;  // whole turns, exactly
        hi n = __builtin_convertvector((hl)(x + integer), hi) << shift;
        memcpy(delta + m, &n, sizeof n);
    }
}

constexpr double RADIANS = 6.283185307179586476925 / 4294967296.0;

