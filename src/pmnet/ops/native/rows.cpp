// What is computed row by row: norms, the rotary rotation, the gate of the MLP.
//
// Shapes: rows R, width D of a row, B, T, H heads, E width of a head.
#include "rows.h"

// Gradient of x; adds the gradient of the weight to `grad_weight`.
static inline void norm_row_gradient(
    const float* x, const float* weight, const float* upstream, float* grad_x, float* grad_weight, int64_t width, float eps) {
    float scale = inverse_norm(x, width, eps);
    v16 dot{}, r = splat(scale);
    for (int64_t i = 0; i < width; i += LANES) {
        int64_t left = width - i;
        v16 normed = load(x + i, left) * r, g = load(upstream + i, left);
        dot = fma(g * load(weight + i, left), normed, dot);
        store(grad_weight + i, fma(g, normed, load(grad_weight + i, left)), left);
    }
    v16 mean = splat(sum(dot) / width);
    for (int64_t i = 0; i < width; i += LANES) {
        int64_t left = width - i;
        v16 normed = load(x + i, left) * r, g = load(upstream + i, left) * load(weight + i, left);
        store(grad_x + i, (g - normed * mean) * r, left);
    }
}

extern "C" {

void rms_norm(const float* x, const float* weight, float* y, int64_t rows, int64_t width, float eps) {
#pragma omp parallel for if (rows * width > 16384)
    for (int64_t r = 0; r < rows; r++) norm_row(x + r * width, weight, y + r * width, width, eps);
}

// grad_weight is [blocks, width], one row for each block of `block` rows, so that sums do not depend on threads.
void rms_norm_backward(
    const float* x, const float* weight, const float* upstream, float* grad_x, float* grad_weight, int64_t rows,
    int64_t width, int64_t block, float eps) {
    int64_t blocks = (rows + block - 1) / block;
#pragma omp parallel for
    for (int64_t b = 0; b < blocks; b++)
        for (int64_t r = b * block; r < rows && r < (b + 1) * block; r++)
            norm_row_gradient(x + r * width, weight, upstream + r * width, grad_x + r * width, grad_weight + b * width, width, eps);
}

// Norm and rotation of heads: x, y [B, T, H, E]; cosine, sine [B or 1, T, E]; table_rows is T or B * T.
void norm_rotate(
    const float* x, const float* weight, const float* cosine, const float* sine, float* y, int64_t positions,
    int64_t table_rows, int64_t heads, int64_t width, float eps) {
#pragma omp parallel for if (positions * heads * width > 16384)
    for (int64_t t = 0; t < positions; t++)
        for (int64_t h = 0; h < heads; h++) {
            int64_t at = (t * heads + h) * width, row = t % table_rows * width;
            norm_row(x + at, weight, y + at, width, eps);
            rotate_row(y + at, cosine + row, sine + row, y + at, width, 1.f);
        }
}

void norm_rotate_backward(
    const float* x, const float* weight, const float* cosine, const float* sine, const float* upstream, float* grad_x,
    float* grad_weight, int64_t positions, int64_t table_rows, int64_t heads, int64_t width, int64_t block, float eps) {
    int64_t blocks = (positions + block - 1) / block;
#pragma omp parallel for
    for (int64_t b = 0; b < blocks; b++)
        for (int64_t t = b * block; t < positions && t < (b + 1) * block; t++)
            for (int64_t h = 0; h < heads; h++) {
                int64_t at = (t * heads + h) * width, row = t % table_rows * width;
                rotate_row(upstream + at, cosine + row, sine + row, grad_x + at, width, -1.f);
                norm_row_gradient(x + at, weight, grad_x + at, grad_x + at, grad_weight + b * width, width, eps);
            }
}

// positions [P]; cosine, sine [P, E]
void rotary_table(const int64_t* positions, float* cosine, float* sine, int64_t count, int64_t width, double theta) {
#pragma omp parallel for if (count > 16)
    for (int64_t t = 0; t < count; t++) rotary_row(positions[t], width, theta, cosine + t * width, sine + t * width);
}

// y = silu(gate) * up
void silu_product(const float* gate, const float* up, float* y, int64_t count) {
#pragma omp parallel for if (count > 16384)
    for (int64_t i = 0; i < count; i += LANES) {
        store(y + i, silu(load(gate + i, count - i)) * load(up + i, count - i), count - i);
    }
}

void silu_product_backward(
    const float* gate, const float* up, const float* upstream, float* grad_gate, float* grad_up, int64_t count) {
#pragma omp parallel for if (count > 16384)
    for (int64_t i = 0; i < count; i += LANES) {
        int64_t left = count - i;
        v16 g = load(gate + i, left), d = load(upstream + i, left), s = logistic(g);
        store(grad_up + i, d * g * s, left);
        store(grad_gate + i, d * load(up + i, left) * s * fma(g, splat(1.f) - s, splat(1.f)), left);
    }
}
}
