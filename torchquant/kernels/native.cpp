// Uniform grids, their codes, and masks. Each function equals the pure torch code it stands for, bit for bit.
#include "steps.h"

namespace tq {

template <typename T>
struct Uniform {
    const T* x;
    T* out;
    uint8_t* bits;  // nullptr: no mask
    const T *step, *low, *high;  // one of each for each channel
    T below, above;  // NaN: none
    bool inside;

    // Return the value of one element, and its flag.
    template <bool MASK>
    static inline T one(T x, T step, T low, T high, T below, T above, Flag<T> any, Flag<T>* flag) {
        T code = std::rint(x / step);
        T kept = code < low ? low : code;  // keeps NaN, and the sign of zero, as torch.clamp does
        kept = kept > high ? high : kept;
        if (MASK) *flag = (any | -Flag<T>(code == kept)) & -Flag<T>(!(x <= below)) & -Flag<T>(!(x >= above));
        return kept * step;
    }

    // n elements of channel c.
    template <bool MASK>
    void along(int64_t c, int64_t n, const T* __restrict x, T* __restrict out, Flag<T>* __restrict flags) const {
        const T step = this->step[c], low = this->low[c], high = this->high[c];
        const T below = this->below, above = this->above;
        const Flag<T> any = inside ? 0 : -1;
        for (int64_t i = 0; i < n; ++i) out[i] = one<MASK>(x[i], step, low, high, below, above, any, flags + i);
    }

    // One element of each of n channels from c.
    template <bool MASK>
    void across(int64_t c, int64_t n, const T* __restrict x, T* __restrict out, Flag<T>* __restrict flags) const {
        const T *__restrict step = this->step + c, *__restrict low = this->low + c, *__restrict high = this->high + c;
        const T below = this->below, above = this->above;
        const Flag<T> any = inside ? 0 : -1;
        for (int64_t i = 0; i < n; ++i) {
            out[i] = one<MASK>(x[i], step[i], low[i], high[i], below, above, any, flags + i);
        }
    }

    template <bool MASK>
    void part(Walk walk, int64_t first, int64_t last) const {
        Flag<T> flags[MASK ? BLOCK : 1];
        for (int64_t block = first; block < last; block += BLOCK) {
            int64_t end = block + BLOCK < last ? block + BLOCK : last;
            walk.run(block, end, [&](bool is_across, int64_t c, int64_t at, int64_t n) {
                Flag<T>* here = MASK ? flags + (at - block) : flags;
                if (is_across) across<MASK>(c, n, x + at, out + at, here);
                else along<MASK>(c, n, x + at, out + at, here);
            });
            if (MASK) pack(flags, bits + block / 8, end - block);
        }
    }
};

#if TQ_AVX2
// n elements of channel c, n a multiple of 8, whose bits begin with a byte: the flags stay in registers.
template <bool INSIDE, bool STRICT>
static void packed(const Uniform<float>& grid, int64_t c, int64_t at, int64_t n) {
    const float* x = grid.x + at;
    float* out = grid.out + at;
    uint8_t* bits = grid.bits + at / 8;
    const __m256 step = _mm256_set1_ps(grid.step[c]), low = _mm256_set1_ps(grid.low[c]);
    const __m256 high = _mm256_set1_ps(grid.high[c]);
    const __m256 below = _mm256_set1_ps(grid.below), above = _mm256_set1_ps(grid.above);
    for (int64_t i = 0; i < n; i += 8) {
        __m256 from = _mm256_loadu_ps(x + i);
        __m256 code = _mm256_round_ps(_mm256_div_ps(from, step), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        __m256 kept = _mm256_min_ps(high, _mm256_max_ps(low, code));  // the second operand if one is NaN
        _mm256_storeu_ps(out + i, _mm256_mul_ps(kept, step));
        __m256 flag = _mm256_castsi256_ps(_mm256_set1_epi32(-1));
        if (INSIDE) flag = _mm256_cmp_ps(code, kept, _CMP_EQ_OQ);
        if (STRICT) flag = _mm256_and_ps(flag, _mm256_cmp_ps(from, below, _CMP_NLE_UQ));
        if (STRICT) flag = _mm256_and_ps(flag, _mm256_cmp_ps(from, above, _CMP_NGE_UQ));
        bits[i / 8] = uint8_t(_mm256_movemask_ps(flag));
    }
}

// The elements from `first` to `last` whose bits are whole bytes of one channel each. Returns where they end.
static int64_t pack_at_once(const Uniform<float>& grid, Walk walk, int64_t first, int64_t last) {
    if (walk.channels != 1 && walk.inner % 8 != 0) return first;
    const bool is_strict = grid.below == grid.below || grid.above == grid.above;
    const auto run = !grid.inside ? packed<false, true> : is_strict ? packed<true, true> : packed<true, false>;
    last = first + (last - first) / 8 * 8;
    walk.run(first, last, [&](bool, int64_t c, int64_t at, int64_t n) { run(grid, c, at, n); });
    return last;
}
#endif

template <typename T>
static int64_t pack_at_once(const Uniform<T>&, Walk, int64_t first, int64_t) {
    return first;
}

// A code counted from real 0.
template <typename T>
static inline T centred(Number<T> code, Number<T> zero_point, int64_t c) {
    if (code.given == nullptr && zero_point.given == nullptr) return T(code.plain - zero_point.plain);
    return code.of(c) - zero_point.of(c);
}

// Whether all of n flags that were packed are 1.
static inline bool are_ones(const uint8_t* bits, int64_t n) {
    int64_t i = 0;
    for (; i + 64 <= n; i += 64) {
        uint64_t word;
        std::memcpy(&word, bits + i / 8, sizeof word);
        if (word != ~uint64_t(0)) return false;
    }
    for (; i < n; i += 8) {
        if (bits[i / 8] != (n - i < 8 ? (1 << (n - i)) - 1 : 255)) return false;
    }
    return true;
}

template <typename T>
int uniform(const T* x, T* out, uint8_t* bits, Walk walk, Number<T> step, Number<T> low, Number<T> high,
            Number<T> zero_point, Clamp clamp, int inside, void* parallel, int threads) {
    Rows<T> rows(3, walk.channels);
    if (rows.is_missing()) return 1;
    for (int64_t c = 0; c < walk.channels; ++c) {
        rows[1][c] = centred(low, zero_point, c);
        rows[2][c] = centred(high, zero_point, c);
        clamp.narrow(step.of(c), &rows[1][c], &rows[2][c]);
        bool is_nan = std::isnan(rows[1][c]) || std::isnan(rows[2][c]);  // makes all values NaN
        rows[0][c] = is_nan ? T(NAN) : step.of(c);
    }
    expect_writes(out, walk.n() * int64_t(sizeof(T)));
    const T below = clamp.is_strict ? T(clamp.low) : T(NAN), above = clamp.is_strict ? T(clamp.high) : T(NAN);
    Uniform<T> grid{x, out, bits, rows[0], rows[1], rows[2], below, above, inside != 0};
    in_chunks(walk.n(), parallel, threads, [&](int64_t first, int64_t last) {
        if (bits == nullptr) grid.template part<false>(walk, first, last);
        else grid.template part<true>(walk, pack_at_once(grid, walk, first, last), last);
    });
    return bits != nullptr && are_ones(bits, walk.n()) ? ALL_ONES : 0;
}

template int uniform(const float*, float*, uint8_t*, Walk, Number<float>, Number<float>, Number<float>, Number<float>, Clamp,
                     int, void*, int);
template int uniform(const double*, double*, uint8_t*, Walk, Number<double>, Number<double>, Number<double>,
                     Number<double>, Clamp, int, void*, int);

// Codes of levels, counted from `low`, 0 for NaN. Returns whether there is a NaN. `step[i]`, `low[i]`: of each element.
template <bool DIVIDES, typename T, typename Each>
static Flag<T> encode(const T* __restrict from, uint8_t* __restrict to, int64_t n, Each step, Each low) {
    Flag<T> is_nan = 0;
    for (int64_t block = 0; block < n; block += BLOCK) {
        const int64_t size = block + BLOCK < n ? BLOCK : n - block;
        int32_t codes[BLOCK];
        for (int64_t i = 0; i < size; ++i) {
            const T quotient = DIVIDES ? from[block + i] / step[block + i] : from[block + i] * step[block + i];
            const T code = std::rint(quotient) - low[block + i];
            is_nan |= -Flag<T>(code != code);
            codes[i] = int32_t(code == code ? code : T(0));
        }
        for (int64_t i = 0; i < size; ++i) to[block + i] = uint8_t(codes[i]);
    }
    return is_nan;
}

// Whether levels times `1 / step` round to the codes of levels over the step: the reciprocal is no subnormal number,
// and the codes are small.
template <typename T>
static inline bool has_reciprocal(T step, T low) {
    return step > T(0x1p-120) && step < T(0x1p120) && std::fabs(low) < T(1 << 16);
}

template <typename T>
static int to_codes(const T* x, uint8_t* out, T* zero_or_nan, Walk walk, Number<T> step, Number<T> low,
                    Number<T> zero_point, void* parallel, int threads) {
    Rows<T> rows(2, walk.channels);
    if (rows.is_missing()) return 1;
    for (int64_t c = 0; c < walk.channels; ++c) {
        rows[0][c] = step.of(c);
        rows[1][c] = centred(low, zero_point, c);
    }
    const T *steps = rows[0], *lows = rows[1];
    std::atomic<bool> has_nan{false};
    in_chunks(walk.n(), parallel, threads, [&](int64_t first, int64_t last) {
        Flag<T> is_nan = 0;
        walk.run(first, last, [&](bool is_across, int64_t c, int64_t at, int64_t n) {
            const Same<T> step{steps[c]}, low{lows[c]}, inverse{T(1) / steps[c]};
            if (is_across) is_nan |= encode<true>(x + at, out + at, n, Each<T>{steps + c}, Each<T>{lows + c});
            else if (has_reciprocal(steps[c], lows[c])) is_nan |= encode<false>(x + at, out + at, n, inverse, low);
            else is_nan |= encode<true>(x + at, out + at, n, step, low);
        });
        if (is_nan) has_nan = true;
    });
    *zero_or_nan = has_nan ? T(NAN) : T(0);
    return 0;
}

template <typename T>
static int from_codes(const uint8_t* codes, T* out, Walk walk, Number<T> step, Number<T> low, Number<T> zero_point,
                      void* parallel, int threads) {
    Rows<T> rows(2, walk.channels);
    if (rows.is_missing()) return 1;
    for (int64_t c = 0; c < walk.channels; ++c) {
        rows[0][c] = step.of(c);
        rows[1][c] = centred(low, zero_point, c);
    }
    const T *steps = rows[0], *lows = rows[1];
    expect_writes(out, walk.n() * int64_t(sizeof(T)));
    in_chunks(walk.n(), parallel, threads, [=](int64_t first, int64_t last) {
        walk.run(first, last, [=](bool is_across, int64_t c, int64_t at, int64_t n) {
            const uint8_t* __restrict from = codes + at;
            T* __restrict to = out + at;
            const T *__restrict step = steps + c, *__restrict low = lows + c;
            const T one_step = *step, one_low = *low;
            if (is_across) for (int64_t i = 0; i < n; ++i) to[i] = (T(from[i]) + low[i]) * step[i];
            else for (int64_t i = 0; i < n; ++i) to[i] = (T(from[i]) + one_low) * one_step;
        });
    });
    return 0;
}

// `masked(element, bit)` for each element, 32 at a time.
template <typename T, typename Masked>
static void by_bits(const T* grad, const uint8_t* bits, T* out, int64_t n, void* parallel, int threads, Masked masked) {
    expect_writes(out, n * int64_t(sizeof(T)));
    in_chunks(n, parallel, threads, [=](int64_t first, int64_t last) {
        int64_t i = first;
        for (; i + 32 <= last; i += 32) {
            const T* __restrict from = grad + i;
            T* __restrict to = out + i;
            const uint8_t* byte = bits + i / 8;
            const uint32_t word = byte[0] | byte[1] << 8 | byte[2] << 16 | uint32_t(byte[3]) << 24;
            for (int k = 0; k < 32; ++k) to[k] = masked(from[k], int(word >> k) & 1);
        }
        for (; i < last; ++i) out[i] = masked(grad[i], (bits[i / 8] >> (i % 8)) & 1);
    });
}

// A half type times 1 or 0, on its bits: infinity and NaN times 0 are NaN, and zero keeps the sign.
struct MaskedHalf {
    uint16_t exponent, nan;
    uint16_t operator()(uint16_t grad, int bit) const {
        uint16_t zeroed = (grad & exponent) == exponent ? nan : uint16_t(grad & 0x8000);
        return bit ? grad : zeroed;
    }
};

}  // namespace tq

#define UNIFORM(NAME, T)                                                                                              \
    EXPORT int NAME(const T* x, T* out, uint8_t* bits, WALK, NUMBER(T, step), NUMBER(T, low), NUMBER(T, high),        \
                    NUMBER(T, zero_point), double least, double most, int strict, int inside, void* parallel,         \
                    int threads) {                                                                                    \
        return tq::uniform<T>(x, out, bits, THE_WALK, GIVEN(T, step), GIVEN(T, low), GIVEN(T, high),                  \
                              GIVEN(T, zero_point), {least, most, strict != 0}, inside, parallel, threads);           \
    }
UNIFORM(uniform_float32, float)
UNIFORM(uniform_float64, double)

#define TO_CODES(NAME, T)                                                                                             \
    EXPORT int NAME(const T* x, uint8_t* out, T* zero_or_nan, WALK, NUMBER(T, step), NUMBER(T, low),                  \
                    NUMBER(T, zero_point), void* parallel, int threads) {                                             \
        return tq::to_codes<T>(x, out, zero_or_nan, THE_WALK, GIVEN(T, step), GIVEN(T, low), GIVEN(T, zero_point),    \
                               parallel, threads);                                                                    \
    }
TO_CODES(to_codes_float32, float)
TO_CODES(to_codes_float64, double)

#define FROM_CODES(NAME, T)                                                                                           \
    EXPORT int NAME(const uint8_t* x, T* out, WALK, NUMBER(T, step), NUMBER(T, low), NUMBER(T, zero_point),           \
                    void* parallel, int threads) {                                                                    \
        return tq::from_codes<T>(x, out, THE_WALK, GIVEN(T, step), GIVEN(T, low), GIVEN(T, zero_point), parallel,     \
                                 threads);                                                                            \
    }
FROM_CODES(from_codes_float32, float)
FROM_CODES(from_codes_float64, double)

#define MASKED(NAME, T, FUNCTION)                                                                                     \
    EXPORT int NAME(const T* grad, const uint8_t* bits, T* out, int64_t n, void* parallel, int threads) {             \
        tq::by_bits<T>(grad, bits, out, n, parallel, threads, FUNCTION);                                              \
        return 0;                                                                                                     \
    }
MASKED(masked_float32, float, [](float grad, int bit) { return grad * float(bit); })
MASKED(masked_float64, double, [](double grad, int bit) { return grad * double(bit); })
MASKED(masked_float16, uint16_t, (tq::MaskedHalf{0x7C00, 0x7E00}))
MASKED(masked_bfloat16, uint16_t, (tq::MaskedHalf{0x7F80, 0x7FC0}))
