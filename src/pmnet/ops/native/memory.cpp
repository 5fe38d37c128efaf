// The phase memory: agreement of phases, mixing of slots, geometry.
//
// Shapes: P positions (B * T), R read heads, N slots, M phases. Angles are radians; a raw value x
// stands for the angle pi * tanh(x). Equations: arXiv 2605.13370, steps 2 and 3 of a layer.
#include "phases.h"

extern "C" {

// query [P, R, M] and keys [P, N, R, M] raw, weights [P, N, R]
void address(const float* query, const float* keys, float* weights, int64_t positions, int64_t slots, int64_t heads, int64_t size) {
#pragma omp parallel for if (positions * slots * heads * size > 4096)
    for (int64_t t = 0; t < positions; t++)
        for (int64_t r = 0; r < heads; r++)
            address_head(query + (t * heads + r) * size, keys + (t * slots * heads + r) * size, heads * size, slots, size,
                         weights + t * slots * heads + r, heads);
}

// bias [R, M], or null, is added to the keys; grad_keys may be `keys` itself.
void address_backward(const float* query, const float* keys, const float* bias, const float* weights, const float* upstream, float* grad_query,
                      float* grad_keys, int64_t positions, int64_t slots, int64_t heads, int64_t size) {
    float scale = 1.f / __builtin_sqrtf((float)size);
#pragma omp parallel for if (positions * slots * heads * size > 4096)
    for (int64_t t = 0; t < positions; t++)
        for (int64_t r = 0; r < heads; r++) {
            const float *a = weights + t * slots * heads + r, *d = upstream + t * slots * heads + r;
            float mean = 0, slope[MOST_SLOTS];
            for (int64_t n = 0; n < slots; n++) mean = __builtin_fmaf(a[n * heads], d[n * heads], mean);
            for (int64_t n = 0; n < slots; n++) slope[n] = a[n * heads] * (d[n * heads] - mean) * scale * PI;
            for (int64_t m = 0; m < size; m += LANES) {
                int64_t left = size - m, at = (t * heads + r) * size + m;
                v16 q = tanh(load(query + at, left)), total{};
                for (int64_t n = 0; n < slots; n++) {
                    int64_t key = ((t * slots + n) * heads + r) * size + m;
                    v16 k = half_turns(keys + key - m, bias ? bias + r * size : nullptr, m, left);
                    v16 g = sine_pi(q - k) * splat(slope[n]);
                    total -= g;
                    store(grad_keys + key, g * (splat(1.f) - k * k), left);
                }
                store(grad_query + at, total * (splat(1.f) - q * q), left);
            }
        }
}

// mixed[p, r, :] = sum_n weights[p, n, r] geometry[p, n, :], with `width` = 2M
void mix(const float* weights, const float* geometry, float* mixed, int64_t positions, int64_t slots, int64_t heads, int64_t width) {
#pragma omp parallel for if (positions * slots * heads * width > 4096)
    for (int64_t t = 0; t < positions; t++)
        for (int64_t r = 0; r < heads; r++)
            mix_head(weights + t * slots * heads + r, heads, geometry + t * slots * width, slots, width, mixed + (t * heads + r) * width);
}

// grad_geometry is overwritten.
void mix_backward(const float* weights, const float* geometry, const float* upstream, float* grad_weights, float* grad_geometry,
                  int64_t positions, int64_t slots, int64_t heads, int64_t width) {
#pragma omp parallel for if (positions * slots * heads * width > 4096)
    for (int64_t t = 0; t < positions; t++)
        for (int64_t n = 0; n < slots; n++) {
            const float *line = geometry + (t * slots + n) * width, *a = weights + (t * slots + n) * heads;
            for (int64_t r = 0; r < heads; r++) {
                v16 dot{};
                for (int64_t c = 0; c < width; c += LANES)
                    dot = fma(load(line + c, width - c), load(upstream + (t * heads + r) * width + c, width - c), dot);
                grad_weights[(t * slots + n) * heads + r] = sum(dot);
            }
            mix_head(a, 1, upstream + t * heads * width, heads, width, grad_geometry + (t * slots + n) * width);
        }
}

// out[p, n, :] = [sin ; cos](field[p, n, :] + anchors[groups[p], n, :]); field may be null
void geometry(const float* field, const float* anchors, const int64_t* groups, float* out, int64_t positions, int64_t slots, int64_t size) {
    geometries(field, anchors, groups, out, positions, slots, size);
}

// Gradient of the angles, from the geometry itself; rows = P * N
void geometry_backward(const float* geometry, const float* upstream, float* grad, int64_t rows, int64_t size) {
#pragma omp parallel for if (rows * size > 2048)
    for (int64_t t = 0; t < rows; t++)
        for (int64_t m = 0; m < size; m += LANES) {
            int64_t at = t * 2 * size + m, left = size - m;
            v16 s = load(geometry + at, left), c = load(geometry + at + size, left);
            store(grad + t * size + m, fma(load(upstream + at, left), c, -(load(upstream + at + size, left) * s)), left);
        }
}
}
