// Products with bfloat16 in twelve bits: see Twelve in kernels.hpp. Included once per instruction
// set. The numbers and the order in which they are added are those of bfloat16, so are the bits.

class Twelves {
public:
    Twelves(const Matrix& w, i64 row)
        : row_((const Twelve*)((const char*)w.data + row * Twelve::bytes(w.columns))), groups_((const std::uint8_t*)(row_ + 1)),
          aside_(w.aside + row_->first * 32), high_(repeat16(row_->high)), low_(repeat16(row_->low)) {}

    const void* begin() const { return row_; }

    // blocks b and b + 1, b even; every b in turn
    void two(i64 b, F16 even[2], F16 odd[2]) {
        const std::uint8_t* p = groups_ + b / 4 * Twelve::GROUP;
        const B64 rest = load_bytes(p + b % 4 * 32), which = load_bytes(p + 128);
        const B64 high = b % 4 ? pick_high(high_, which) : pick_low(high_, which);
        const B64 low = b % 4 ? pick_high(low_, which) : pick_low(low_, which);
        B64 numbers[2];
        weave(either(both(rest, repeat16(FRACTION)), low), either(both(rest, repeat16(SIGN)), high), numbers[0], numbers[1]);
        if (const int bits = row_->is_aside[b / 8] >> b % 8 & 3; __builtin_expect(bits, 0))
            for (int i = 0; i < 2; i++)
                if (bits >> i & 1) numbers[i] = load_bytes(aside_), aside_ += 32;
        for (int i = 0; i < 2; i++) split_bf16(numbers[i], even[i], odd[i]);
    }

private:
    static constexpr std::uint8_t A = 0x80, Z = 0x7f;
    static constexpr std::uint8_t SIGN[16] = {A, A, A, A, A, A, A, A, A, A, A, A, A, A, A, A};
    static constexpr std::uint8_t FRACTION[16] = {Z, Z, Z, Z, Z, Z, Z, Z, Z, Z, Z, Z, Z, Z, Z, Z};
    const Twelve* row_;
    const std::uint8_t* groups_;
    const std::uint16_t* aside_;
    B64 high_, low_;
};

// R rows x M tokens, as dot_block
template <int R, int M>
static inline void twelve_block(const Matrix& w, i64 row, const float* const* x, float* out, i64 stride, const float* bias) {
    F16 acc[R][M];
    for (int r = 0; r < R; r++)
        for (int m = 0; m < M; m++) acc[r][m] = set(0);
    alignas(Twelves) char space[R][sizeof(Twelves)];
    Twelves* rows = (Twelves*)space;
    for (int r = 0; r < R; r++) new (rows + r) Twelves(w, row + r);
    const char* next = (const char*)rows[0].begin() + R * Twelve::bytes(w.columns);  // see ask_next
    const i64 blocks = w.blocks();
    for (i64 b = 0; b < blocks; b += 2, next += R * 96 + 64) {
        for (int i = 0; i < R * 96 + 64; i += 64) __builtin_prefetch(next + i, 0, 2);
        for (int r = 0; r < R; r++) {
            F16 even[2], odd[2];
            rows[r].two(b, even, odd);
            for (int i = 0; i < 2 && b + i < blocks; i++)
                for (int m = 0; m < M; m++) {
                    const float* here = x[m] + 32 * (b + i);
                    acc[r][m] = fma(even[i], load(here), acc[r][m]);
                    acc[r][m] = fma(odd[i], load(here + 16), acc[r][m]);
                }
        }
    }
    for (int m = 0; m < M; m++)
        for (int r = 0; r < R; r++) out[m * stride + r] = sum(acc[r][m]) + (bias ? bias[r] : 0.f);
}

static void dot_twelve(const Matrix& w, i64 row, i64 rows, const float* x, const std::int32_t* at, i64 tokens, float* out,
                       i64 stride, const float* bias) {
    const i64 step = w.blocks() * 32;
    auto some = [&]<int R, int M>(i64 r, i64 t) {
        const float* here[M];
        for (int m = 0; m < M; m++) here[m] = x + at[t + m] * step;
        twelve_block<R, M>(w, row + r, here, out + t * stride + r, stride, bias ? bias + r : nullptr);
    };
    auto all = [&]<int M>(i64 t) {
        i64 r = 0;
        for (; r + DIRECT_ROWS <= rows; r += DIRECT_ROWS) some.template operator()<DIRECT_ROWS, M>(r, t);
        for (; r < rows; r++) some.template operator()<1, M>(r, t);
    };
    i64 t = 0;
    for (; t + 4 <= tokens; t += 4) all.template operator()<4>(t);
    if (tokens - t == 3) all.template operator()<3>(t);
    if (tokens - t == 2) all.template operator()<2>(t);
    if (tokens - t == 1) all.template operator()<1>(t);
}

static void unpack_twelve(const Matrix& w, i64 row, i64 rows, float* out) {
    const i64 blocks = w.blocks();
    for (i64 r = 0; r < rows; r++) {
        Twelves here(w, row + r);
        for (i64 b = 0; b < blocks; b += 2) {
            F16 even[2], odd[2];
            here.two(b, even, odd);
            for (int i = 0; i < 2 && b + i < blocks; i++, out += 32) store(out, even[i]), store(out + 16, odd[i]);
        }
    }
}
