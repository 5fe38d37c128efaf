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

// Weights of the read, packed: keys of some heads at a time, values of each head.
struct ReadWeights {
    int64_t slots, heads, size, together;  // heads whose keys are computed at a time
    std::vector<std::unique_ptr<Packed>> keys, values;

    ReadWeights(const Weight& w, bool with_values, int64_t slots, int64_t heads, int64_t size) : slots(slots), heads(heads), size(size) {
        together = size >= 512 ? 1 : 512 / size < heads ? 512 / size : heads;
        for (int64_t r = 0; r < heads; r += together)
            keys.emplace_back(new Packed(part_of(w, r * size, (heads - r < together ? heads - r : together) * size)));
        for (int64_t r = 0; with_values && r < heads; r++) values.emplace_back(new Packed(part_of(w, (heads + r) * size, size)));
    }
};

// What one thread reads blocks of at most `block` positions with.
struct Reader {
    const ReadWeights& w;
    int64_t block, width, wide, ld;  // floats of a slot's geometry, of all heads, of the keys of a row
    Distinct distinct;
    Floats keys, mixed, lines;

    Reader(const ReadWeights& w, int64_t block, int64_t span)
        : w(w), block(block), width(2 * w.size), wide(w.heads * w.size), ld(w.together * w.size), keys(block * w.slots * ld), mixed(span * width),
          lines(block * w.slots * (pass_of(width) + LANES)) {}

    // Positions from the first one on, `most` of them or as many as have room; returns how many it were. values may be null.
    int64_t read(const float* query, const float* geometry, float* slot_weights, float* values, int64_t most) {
        int64_t count = distinct.find(geometry, most, w.slots, width, block * w.slots);
        for (int64_t r = 0; r < w.heads; r++) {
            if (r % w.together == 0) make_keys(*w.keys[r / w.together]);
            for (int64_t t = 0; t < count; t++) {
                float* a = slot_weights + t * w.slots * w.heads + r;
                address(query + t * wide + r * w.size, t, r % w.together * w.size, a);
                if (values) mix_head(a, w.heads, geometry + t * w.slots * width, w.slots, width, mixed.data() + t * width);
            }
            if (values) w.values[r]->apply([&](int64_t i) { return mixed.data() + i * width; }, values + r * w.size, wide, count, lines.data());
        }
        return count;
    }

   private:
    void make_keys(Packed& weights) {
        int64_t rows = distinct.rows.size();
        weights.apply([&](int64_t i) { return distinct.rows[i]; }, keys.data(), ld, rows, lines.data());
        for (int64_t i = 0; i < rows * ld; i += LANES) store(&keys.data()[i], tanh(load(&keys.data()[i], rows * ld - i)), rows * ld - i);
    }
    void address(const float* query, int64_t t, int64_t from, float* a) {
        const int64_t* row = &distinct.of[t * w.slots];
        auto key = [&](int64_t n, int64_t m, int64_t left) { return load(&keys.data()[row[n] * ld + from + m], left); };
        address_head(query, key, w.slots, w.size, a, w.heads);
    }
};

void read_slots(const float* query, const float* geometry, const Weight& w, float* slot_weights, float* values, int64_t positions, int64_t slots,
                int64_t heads, int64_t size) {
    if (positions < FEW) return read_few(query, geometry, w, slot_weights, values, positions, slots, heads, size);
    int64_t wide = heads * size, block = ROW_BLOCK / slots > 8 ? ROW_BLOCK / slots : 8;
    int64_t span = (32 + block - 1) / block * block;  // positions of one thread's turn
    ReadWeights packed(w, values, slots, heads, size);
#pragma omp parallel
    {
        Reader reader(packed, block, span);
#pragma omp for schedule(dynamic, 1)
        for (int64_t first = 0; first < positions; first += span)
            for (int64_t t = first, end = positions - first < span ? positions : first + span; t < end;)
                t += reader.read(query + t * wide, geometry + t * slots * 2 * size, slot_weights + t * slots * heads,
                                 values ? values + t * wide : nullptr, end - t);
    }
}

extern "C" {

void read_slots(const float* query, const float* geometry, const float* weight, const float* bias, float* slot_weights, float* values,
                int64_t positions, int64_t slots, int64_t heads, int64_t size) {
    read_slots(query, geometry, Weight{weight, nullptr, bias, 2 * size, 2 * heads * size}, slot_weights, values, positions, slots, heads, size);
}
}
