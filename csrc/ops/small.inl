// The operations between the products. Included once per instruction set.

static void widen(const std::uint16_t* x, i64 n, float* out) {
    i64 i = 0;
    for (; i + 16 <= n; i += 16) store(out + i, load_bf16(x + i));
    for (; i < n; i++) {
        const std::uint32_t bits = std::uint32_t(x[i]) << 16;
        __builtin_memcpy(out + i, &bits, 4);
    }
}

static void rms_norm(const float* x, const float* scale, i64 columns, float eps, float* out) {
    F16 squares = set(0);
    float rest = 0;
    i64 i = 0;
    for (; i + 16 <= columns; i += 16) squares = fma(load(x + i), load(x + i), squares);
    for (i64 k = i; k < columns; k++) rest = __builtin_fmaf(x[k], x[k], rest);
    const float by = 1.f / __builtin_sqrtf((sum(squares) + rest) / float(columns) + eps);
    for (i = 0; i + 16 <= columns; i += 16) store(out + i, mul(mul(load(x + i), set(by)), load(scale + i)));
    for (; i < columns; i++) out[i] = x[i] * by * scale[i];
}

// e ** x: x = n ln 2 + r, |r| <= ln 2 / 2, a polynomial of degree 7 for e ** r. Cody & Waite's
// reduction in two parts; within 1.5 units in the last place; 0 below -103, infinite above 89.
static inline F16 exponential(F16 x) {
    x = min(max(x, set(-104.f)), set(89.f));
    I16 n = to_int(mul(x, set(1.44269504f)));
    F16 k = to_float(n);
    F16 r = fma(k, set(-0.693145752f), x);
    r = fma(k, set(-1.42860677e-6f), r);
    F16 p = set(1.f / 5040);
    p = fma(p, r, set(1.f / 720));
    p = fma(p, r, set(1.f / 120));
    p = fma(p, r, set(1.f / 24));
    p = fma(p, r, set(1.f / 6));
    p = fma(p, r, set(.5f));
    p = fma(p, r, set(1.f));
    p = fma(p, r, set(1.f));
    // times 2 ** n in two steps, for n from -150 to 128 does not fit one exponent
    I16 half = to_int(mul(k, set(.5f)));
    F16 a = floats(left<23>(add(half, set_int(127))));
    F16 b = floats(left<23>(add(sub(n, half), set_int(127))));
    return mul(mul(p, a), b);
}

// gate * sigmoid(1.702 gate) * (up + 1); gate and up interleaved, clamped: reference.swiglu
static inline F16 swiglu(F16 gate, F16 up, F16 limit) {
    const F16 doubt = fma(gate, set(0), mul(up, set(0)));  // NaN where the clamps hide one, else 0
    gate = min(gate, limit);
    up = min(max(up, sub(set(0), limit)), limit);
    F16 down = add(set(1.f), exponential(mul(set(-1.702f), gate)));
    return fma(div(gate, down), add(up, set(1.f)), doubt);
}

static void swiglu_row(const float* x, i64 half, float limit, float* out) {
    F16 gate, up;
    i64 i = 0;
    for (; i + 16 <= half; i += 16) {
        split_floats(x + 2 * i, gate, up);
        store(out + i, swiglu(gate, up, set(limit)));
    }
    if (i < half) {
        float some[32] = {}, y[16];
        __builtin_memcpy(some, x + 2 * i, std::size_t(half - i) * 8);
        split_floats(some, gate, up);
        store(y, swiglu(gate, up, set(limit)));
        __builtin_memcpy(out + i, y, std::size_t(half - i) * 4);
    }
}

static void blend(const float* const* x, const float* share, i64 n, i64 columns, float* out) {
    i64 c = 0;
    for (; c + 16 <= columns; c += 16) {
        F16 total = set(0);
        for (i64 i = 0; i < n; i++) total = fma(load(x[i] + c), set(share[i]), total);
        store(out + c, total);
    }
    for (; c < columns; c++) {
        float total = 0;
        for (i64 i = 0; i < n; i++) total = __builtin_fmaf(x[i][c], share[i], total);
        out[c] = total;
    }
}

static void rope(const float* x, const float* cos, const float* sin, i64 heads, i64 half, float* out) {
    for (i64 h = 0; h < heads; h++, x += 2 * half, out += 2 * half) {
        i64 i = 0;
        for (; i + 16 <= half; i += 16) {
            F16 a = load(x + i), b = load(x + half + i), c = load(cos + i), s = load(sin + i);
            store(out + i, sub(mul(a, c), mul(b, s)));
            store(out + half + i, add(mul(b, c), mul(a, s)));
        }
        for (; i < half; i++) {
            const float a = x[i], b = x[half + i];
            out[i] = a * cos[i] - b * sin[i];
            out[half + i] = b * cos[i] + a * sin[i];
        }
    }
}
