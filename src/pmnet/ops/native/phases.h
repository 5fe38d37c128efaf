// Phases: agreement, mixing of slots, geometry, rounding. Shapes as in memory.cpp.
#pragma once
#include "vector.h"

constexpr int MOST_SLOTS = 128;

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

// Weights a_n = softmax_n(sum_m cos(q_m - k_nm) / sqrt(M)) of one position and head; keys of slot n at keys + n * stride.
static inline void address_head(const float* query, const float* keys, const float* bias, int64_t stride, int64_t slots, int64_t size, float* weights, int64_t step) {
    float scores[MOST_SLOTS];
    v16 total[MOST_SLOTS];
    for (int64_t n = 0; n < slots; n++) total[n] = v16{};
    for (int64_t m = 0; m < size; m += LANES) {
        int64_t left = size - m;
        v16 q = tanh(load(query + m, left));
        for (int64_t n = 0; n < slots; n++) {
            v16 c = cosine_pi(q - half_turns(keys + n * stride, bias, m, left));
            for (int l = 0; left < LANES && l < LANES; l++)
                if (l >= left) c[l] = 0;
            total[n] += c;
        }
    }
    float scale = 1.f / __builtin_sqrtf((float)size);
    for (int64_t n = 0; n < slots; n++) scores[n] = sum(total[n]) * scale;
    softmax(scores, slots);
    for (int64_t n = 0; n < slots; n++) weights[n * step] = scores[n];
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

// One rotation: round(p * theta / 2pi * 2^bits), in turns of 2^32; what is not finite is zero.
static inline int32_t turns(float weight, float angle, double steps, int shift) {
    double x = __builtin_rint((double)(weight * angle) * steps);
    x = __builtin_fabs(x) < 9e15 ? x : 0.0;
    return (int32_t)((uint32_t)(int64_t)x << shift);
}

constexpr double RADIANS = 6.283185307179586476925 / 4294967296.0;

