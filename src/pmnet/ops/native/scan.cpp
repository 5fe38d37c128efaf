// The unitary phasor update: rotations, their running sums in integer turns, and the gradient.
//
// Shapes: B sequences, T positions, G groups of the level, N slots, M phases. On a CPU the recurrence itself is the
// fastest scan: a thread walks along one sequence with 32 phases of every slot, whose state stays in its cache.
#include "kernels.h"
#include "phases.h"

constexpr int64_t PART = 32;  // phases of one walk

// theta = pi * tanh(raw); delta = rounded p * theta; the state of the visited group turns by delta. See phase_write.
void turn(const float* weights, const float* raw, const int64_t* groups, const int64_t* documents, const bool* valid, int32_t* memory,
          float* angle, const Scan& s) {
    int64_t part = s.batch * s.size > PART ? PART : LANES, parts = (s.size + part - 1) / part;
#pragma omp parallel for collapse(2) if (s.batch * s.length * s.slots * s.size > 4096)
    for (int64_t b = 0; b < s.batch; b++)
        for (int64_t block = 0; block < parts; block++) {
            int64_t from = block * part, count = s.size - from < part ? s.size - from : part, document = 0;
            int32_t* state = memory + b * s.groups * s.slots * s.size + from;
            for (int64_t t = b * s.length; t < (b + 1) * s.length; t++) {
                bool real = !valid || valid[t];
                if (s.cumulative && real && documents && documents[t] != document) {
                    document = documents[t];
                    for (int64_t row = 0; row < s.groups * s.slots; row++) memset(state + row * s.size, 0, count * sizeof(int32_t));
                }
                float theta[PART] = {};
                for (int64_t m = 0; m < count; m += LANES) store(theta + m, tanh(load(raw + t * s.size + from + m, count - m)) * splat(PI));
                for (int64_t n = 0; n < s.slots; n++) {
                    int32_t delta[PART], *slot = state + (groups[t] * s.slots + n) * s.size;
                    float* out = angle + (t * s.slots + n) * s.size + from;
                    turns(weights[t * s.slots + n], theta, part, s.bits, delta);
                    if (s.cumulative && real) {
                        for (int64_t m = 0; m < count; m++) slot[m] = delta[m] = (int32_t)((uint32_t)slot[m] + (uint32_t)delta[m]);
                    }
                    for (int64_t m = 0; m < count; m++) out[m] = (float)(delta[m] * RADIANS);
                }
            }
        }
}

extern "C" {

// counts[b, t]: real positions of the document that visit the same group as t; documents and valid may be null.
void segment_counts(const int64_t* groups, const int64_t* documents, const bool* valid, int64_t* counts, int64_t batch, int64_t length,
                    int64_t group_count) {
#pragma omp parallel for if (batch * length > 16384)
    for (int64_t b = 0; b < batch; b++) {
        std::vector<int64_t> visits(group_count);
        for (int64_t from = b * length, to; from < (b + 1) * length; from = to) {
            std::fill(visits.begin(), visits.end(), 0);
            for (to = from; to < (b + 1) * length && (!documents || documents[to] == documents[from]); to++)
                if (!valid || valid[to]) visits[groups[to]]++;
            for (int64_t t = from; t < to; t++) counts[t] = visits[groups[t]] > 0 ? visits[groups[t]] : 1;
        }
    }
}

// weights [B, T, N], raw [B, T, M], groups [B, T], documents and valid [B, T] or null, memory [B, G, N, M] turns (updated),
// angle [B, T, N, M]: radians right after the write (of the rotation itself, if not cumulative).
void phase_write(const float* weights, const float* raw, const int64_t* groups, const int64_t* documents, const bool* valid,
                 int32_t* memory, float* angle, int64_t batch, int64_t length, int64_t group_count, int64_t slots, int64_t size, int64_t bits,
                 int64_t cumulative) {
    turn(weights, raw, groups, documents, valid, memory, angle, Scan{batch, length, group_count, slots, size, bits, cumulative});
}

// counts [B, T]: positions of the segment each position belongs to, or null for no scaling. grad_weights is
// [parts, B, T, N], one slab for each block of 32 phases.
void phase_write_backward(const float* weights, const float* raw, const int64_t* groups, const int64_t* documents, const bool* valid,
                          const int64_t* counts, const float* upstream, float* grad_weights, float* grad_raw, int64_t batch,
                          int64_t length, int64_t group_count, int64_t slots, int64_t size, int64_t cumulative) {
    int64_t part = PART, parts = (size + part - 1) / part, rows = group_count * slots;
#pragma omp parallel
    {
        std::vector<double> sums(rows * part);
#pragma omp for collapse(2)
        for (int64_t b = 0; b < batch; b++)
            for (int64_t block = 0; block < parts; block++) {
                int64_t from = block * part, count = size - from < part ? size - from : part, document = -1;
                std::fill(sums.begin(), sums.end(), 0.0);
                for (int64_t t = (b + 1) * length - 1; t >= b * length; t--) {
                    bool real = !valid || valid[t];
                    if (real && documents && documents[t] != document) {
                        document = documents[t];
                        std::fill(sums.begin(), sums.end(), 0.0);
                    }
                    double factor = counts ? 1.0 / __builtin_sqrt((double)counts[t]) : 1.0;
                    float theta[PART] = {}, slope[PART], total[PART] = {};
                    for (int64_t m = 0; m < count; m += LANES) {
                        v16 y = tanh(load(raw + t * size + from + m, count - m));
                        store(theta + m, y * splat(PI), count - m);
                        store(slope + m, (splat(1.f) - y * y) * splat(PI));
                    }
                    for (int64_t n = 0; n < slots; n++) {
                        const float* up = upstream + (t * slots + n) * size + from;
                        double* sum_of = sums.data() + (groups[t] * slots + n) * part;
                        float d[PART] = {};
                        for (int64_t m = 0; m < count; m++) {
                            double g = up[m];
                            if (cumulative && real) g = sum_of[m] += g;
                            d[m] = (float)(g * factor);
                        }
                        v16 p = splat(weights[t * slots + n]), dot{};
                        for (int64_t m = 0; m < part; m += LANES) {
                            store(total + m, fma(load(d + m), p, load(total + m)));
                            dot = fma(load(d + m), load(theta + m), dot);
                        }
                        grad_weights[(block * batch * length + t) * slots + n] = sum(dot);
                    }
                    for (int64_t m = 0; m < count; m++) grad_raw[t * size + from + m] = total[m] * slope[m];
                }
            }
    }
}
}
