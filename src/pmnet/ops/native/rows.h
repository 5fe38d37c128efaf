// One row at a time: norm, rotation, gate.
#pragma once
#include "vector.h"

static inline float inverse_norm(const float* x, int64_t width, float eps) {
    v16 squares{};
    for (int64_t i = 0; i < width; i += LANES) {
        v16 v = load(x + i, width - i);
        squares = fma(v, v, squares);
    }
    return 1.f / __builtin_sqrtf(sum(squares) / width + eps);
}

// y = x / rms(x) * weight
static inline void norm_row(const float* x, const float* weight, float* y, int64_t width, float eps) {
    v16 scale = splat(inverse_norm(x, width, eps));
    for (int64_t i = 0; i < width; i += LANES)
        store(y + i, load(x + i, width - i) * scale * load(weight + i, width - i), width - i);
}

// Rotate one head: element j turns together with element j + width / 2. `direction` -1 turns back (the gradient).
static inline void rotate_row(const float* x, const float* cosine, const float* sine, float* y, int64_t width, float direction) {
    int64_t half = width / 2;
    v16 sign = splat(direction);
    for (int64_t i = 0; i < half; i += LANES) {
        int64_t left = half - i;
        v16 a = load(x + i, left), b = load(x + half + i, left);
        v16 c = load(cosine + i, left), s = load(sine + i, left) * sign;
        store(y + i, fma(a, c, -(b * s)), left);
        store(y + half + i, fma(b, c, a * s), left);
    }
}

// Cosines and sines of a position; angles in double precision, so that position 1e7 is as exact as position 1.
static inline void rotary_row(int64_t position, int64_t width, double theta, float* cosine, float* sine) {
    for (int64_t j = 0; j < width / 2; j++) {
        double angle = (double)position * __builtin_pow(theta, -2.0 * (double)j / (double)width);
        cosine[j] = cosine[width / 2 + j] = (float)__builtin_cos(angle);
        sine[j] = sine[width / 2 + j] = (float)__builtin_sin(angle);
    }
}

static inline v16 silu(v16 x) { return x * logistic(x); }
