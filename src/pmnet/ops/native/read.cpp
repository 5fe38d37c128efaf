// The memory read: keys of the slots, their agreement with the query, the mixture of slots, its values.
//
// Shapes: P positions (B * T), R read heads, N slots, M phases. A block of positions goes through all of it at once:
// neither keys nor mixtures leave the processor's cache. What a position did not turn has the geometry it had at the one
// before, bit for bit, and keeps its keys.
#include "packed.h"
#include "phases.h"

constexpr int64_t FEW = 16;  // rows up to which weights are not packed

// Outputs o .. o + count - 1 of w; of 8-bit weights o is a multiple of 16.
static Weight part_of(const Weight& w, int64_t o, int64_t count) {
    const char* values = (const char*)w.values + o * w.inputs * (w.scale ? 1 : sizeof(float));
    return Weight{values, w.scale ? w.scale + o : nullptr, w.bias ? w.bias + o : nullptr, w.inputs, count};
}

// Weights of some outputs, packed for products of one thread.
struct Packed {
    Weight weight;
    Floats panels;
    int64_t step, size;  // inputs of a pass, floats of a pass

    explicit Packed(const Weight& w) : weight(w), step(pass_of(w.inputs)) {
        size = (w.outputs + TILE_COLUMNS - 1) / TILE_COLUMNS * TILE_COLUMNS * step;
        panels.resize(size * ((w.inputs + step - 1) / step));
#pragma omp parallel for if (w.outputs * w.inputs > 65536)
        for (int64_t o = 0; o < w.outputs; o += TILE_COLUMNS)
            for (int64_t from = 0; from < w.inputs; from += step) pack(w, o, from, depth(from), at(o, from));
    }
    int64_t depth(int64_t from) const { return weight.inputs - from < step ? weight.inputs - from : step; }
    float* at(int64_t o, int64_t from) { return panels.data() + from / step * size + o * depth(from); }
    // y [rows, outputs] from row(0), row(1), ...; `lines` has room for the rows
    template <class Row>
    void apply(Row row, float* y, int64_t ldy, int64_t rows, float* lines) {
        for (int64_t from = 0; from < weight.inputs; from += step)
            block_of_rows(row, weight, at(0, from), from, depth(from), lines, y, ldy, rows, 0, weight.outputs);
    }
};

// The rows of some positions, without those that are what the same slot had at the position before.
struct Distinct {
    std::vector<const float*> rows;
    std::vector<int64_t> of;  // [positions, slots], which row each slot has

    // From geometry [most, slots, width]: as many positions as have no more than `room` rows, at least one.
    int64_t find(const float* geometry, int64_t most, int64_t slots, int64_t width, size_t room) {
        rows.clear(), of.clear();
        for (int64_t t = 0; t < most; t++) {
            size_t before = rows.size();
            for (int64_t n = 0; n < slots; n++) {
                const float* row = geometry + (t * slots + n) * width;
                if (t > 0 && alike(row, row - slots * width, width))
                    of.push_back(of[(t - 1) * slots + n]);
                else
                    of.push_back(rows.size()), rows.push_back(row);
            }
            if (t > 0 && rows.size() > room) return rows.resize(before), t;
        }
        return most;
    }
};

// Few positions: the weights are read once, by all threads.
static void read_few(const float* query, const float* geometry, const Weight& w, float* slot_weights, float* values, int64_t positions, int64_t slots,
                     int64_t heads, int64_t size) {
    int64_t wide = heads * size, width = 2 * size;
    Floats keys(positions * slots * wide), mixed(values ? positions * heads * width : 0);
    Job all_keys{geometry, width, part_of(w, 0, wide), keys.data(), wide};
    linear(&all_keys, 1, positions * slots);
#pragma omp parallel for collapse(2) if (positions * wide > 1024)
    for (int64_t t = 0; t < positions; t++)
        for (int64_t r = 0; r < heads; r++) {
            float* a = slot_weights + t * slots * heads + r;
            address_head(query + t * wide + r * size, keys.data() + t * slots * wide + r * size, wide, slots, size, a, heads);
            if (values) mix_head(a, heads, geometry + t * slots * width, slots, width, mixed.data() + (t * heads + r) * width);
        }
    if (!values) return;
    std::vector<Job> of_heads;
    for (int64_t r = 0; r < heads; r++)
        of_heads.push_back({mixed.data() + r * width, heads * width, part_of(w, wide + r * size, size), values + r * size, wide});
    linear(of_heads.data(), heads, positions);
}

void read_slots(const float* query, const float* geometry, const Weight& w, float* slot_weights, float* values, int64_t positions, int64_t slots,
                int64_t heads, int64_t size) {
    if (positions < FEW) return read_few(query, geometry, w, slot_weights, values, positions, slots, heads, size);
    int64_t wide = heads * size, width = 2 * size, block = ROW_BLOCK / slots > 8 ? ROW_BLOCK / slots : 8;
    int64_t span = (32 + block - 1) / block * block;  // positions of one thread's turn
    int64_t together = size >= 512 ? 1 : 512 / size < heads ? 512 / size : heads;  // heads whose keys are computed at a time
    std::vector<std::unique_ptr<Packed>> keys_of, values_of;
    for (int64_t r = 0; r < heads; r += together)
        keys_of.emplace_back(new Packed(part_of(w, r * size, (heads - r < together ? heads - r : together) * size)));
    for (int64_t r = 0; values && r < heads; r++) values_of.emplace_back(new Packed(part_of(w, wide + r * size, size)));
#pragma omp parallel
    {
        Floats keys(block * slots * together * size), mixed(span * width), lines(block * slots * (pass_of(width) + LANES));
        Distinct distinct;
#pragma omp for schedule(dynamic, 1)
        for (int64_t first = 0; first < positions; first += span) {
            int64_t end = positions - first < span ? positions : first + span, count;
            for (int64_t start = first; start < end; start += count) {
                const float* geo = geometry + start * slots * width;
                count = distinct.find(geo, end - start, slots, width, block * slots);
                for (int64_t r = 0; r < heads; r++) {
                    int64_t at = r % together, ld = together * size, rows = distinct.rows.size();
                    if (at == 0) {
                        keys_of[r / together]->apply([&](int64_t i) { return distinct.rows[i]; }, keys.data(), ld, rows, lines.data());
                        for (int64_t i = 0; i < rows * ld; i += LANES) store(&keys.data()[i], tanh(load(&keys.data()[i], rows * ld - i)), rows * ld - i);
                    }
                    for (int64_t t = 0; t < count; t++) {
                        float* a = slot_weights + (start + t) * slots * heads + r;
                        const int64_t* row = &distinct.of[t * slots];
                        auto key = [&](int64_t n, int64_t m, int64_t left) { return load(&keys.data()[row[n] * ld + at * size + m], left); };
                        address_head(query + (start + t) * wide + r * size, key, slots, size, a, heads);
                        if (values) mix_head(a, heads, geo + t * slots * width, slots, width, mixed.data() + t * width);
                    }
                    if (values)
                        values_of[r]->apply([&](int64_t i) { return mixed.data() + i * width; }, values + start * wide + r * size, wide, count, lines.data());
                }
            }
        }
    }
}

extern "C" {

void read_slots(const float* query, const float* geometry, const float* weight, const float* bias, float* slot_weights, float* values,
                int64_t positions, int64_t slots, int64_t heads, int64_t size) {
    read_slots(query, geometry, Weight{weight, nullptr, bias, 2 * size, 2 * heads * size}, slot_weights, values, positions, slots, heads, size);
}
}
