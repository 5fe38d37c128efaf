// Products with few rows, for use inside the native code.
#pragma once
#include "vector.h"

constexpr int64_t DEPTH = 384;  // longest sum of one pass, MAX_DEPTH of ops/linear.py

struct Weight {
    const void* values;  // float [O, K], or int8 panels [O / 16, K, 16] if there is a scale
    const float* scale;  // [O] or null
    const float* bias;   // [O] or null
    int64_t inputs, outputs;
};

void few_rows(const float* x, int64_t ldx, const Weight& w, float* y, int64_t ldy, int64_t rows);
