// Uniform grids and masks. Each function equals the pure torch code it stands for, bit for bit.
#include "common.h"

namespace tq {

template <typename T>
struct Uniform {
    const T* x;
    T* out;
    uint8_t* bits;  // nullptr: no mask
    int64_t channels, inner;
    const T *step, *low, *high;  // one of each for each channel
    T below, above;  // NaN: none
    bool inside;

    // Return the value of one element, and its flag.
    template <bool MASK>
    inline T one(T x, T step, T low, T high, T below, T above, Flag<T> any, Flag<T>* flag) const {
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
        const T* __restrict step = this->step + c;
        const T* __restrict low = this->low + c;
        const T* __restrict high = this->high + c;
        const T below = this->below, above = this->above;
        const Flag<T> any = inside ? 0 : -1;
        for (int64_t i = 0; i < n; ++i) {
            out[i] = one<MASK>(x[i], step[i], low[i], high[i], below, above, any, flags + i);
        }
    }

    template <bool MASK>
    void part(int64_t first, int64_t last) const {
        Flag<T> flags[MASK ? BLOCK : 1];
        int64_t c = first / inner % channels, left = inner - first % inner;
        for (int64_t block = first; block < last; block += BLOCK) {
            int64_t end = block + BLOCK < last ? block + BLOCK : last;
            for (int64_t at = block; at < end;) {
                Flag<T>* here = MASK ? flags + (at - block) : flags;
                int64_t most = inner == 1 ? channels - c : left, n = most < end - at ? most : end - at;
                if (inner == 1) {
                    across<MASK>(c, n, x + at, out + at, here);
                    c = c + n == channels ? 0 : c + n;
                } else {
                    along<MASK>(c, n, x + at, out + at, here);
                    left -= n;
                    if (left == 0) {
                        left = inner;
                        c = c + 1 == channels ? 0 : c + 1;
                    }
                }
                at += n;
            }
            if (MASK) pack(flags, bits + block / 8, end - block);
        }
    }
};

template <typename T>
static int uniform(const T* x, T* out, uint8_t* bits, int64_t outer, int64_t channels, int64_t inner, Number<T> step,
                   Number<T> low, Number<T> high, double below, double above, int inside, void* parallel, int threads) {
    T few[3 * 64];
    T* numbers = channels <= 64 ? few : static_cast<T*>(std::malloc(3 * channels * sizeof(T)));
    if (numbers == nullptr) return 1;
    for (int64_t c = 0; c < channels; ++c) {
        T least = low.of(c), most = high.of(c);
        bool is_nan = std::isnan(least) || std::isnan(most);  // makes all values NaN
        numbers[c] = is_nan ? T(NAN) : step.of(c);
        numbers[channels + c] = least;
        numbers[2 * channels + c] = most;
    }
    int64_t n = outer * channels * inner;
    expect_writes(out, n * int64_t(sizeof(T)));
    Uniform<T> grid{x, out, bits, channels, inner, numbers, numbers + channels, numbers + 2 * channels,
                    T(below), T(above), inside != 0};
    in_chunks(n, parallel, threads, [&grid](int64_t first, int64_t last) {
        if (grid.bits == nullptr) grid.template part<false>(first, last);
        else grid.template part<true>(first, last);
    });
    if (numbers != few) std::free(numbers);
    return 0;
}

// `masked(element, bit)` for each element, eight at a time.
template <typename T, typename Masked>
static void by_bits(const T* grad, const uint8_t* bits, T* out, int64_t n, void* parallel, int threads, Masked masked) {
    expect_writes(out, n * int64_t(sizeof(T)));
    in_chunks(n, parallel, threads, [=](int64_t first, int64_t last) {
        int64_t i = first;
        for (; i + 8 <= last; i += 8) {
            const T* __restrict from = grad + i;
            T* __restrict to = out + i;
            int byte = bits[i / 8];
            for (int k = 0; k < 8; ++k) to[k] = masked(from[k], (byte >> k) & 1);
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
    EXPORT int NAME(const T* x, T* out, uint8_t* bits, int64_t outer, int64_t channels, int64_t inner,                \
                    NUMBER(T, step), NUMBER(T, low), NUMBER(T, high), double below, double above, int inside,         \
                    void* parallel, int threads) {                                                                    \
        return tq::uniform<T>(x, out, bits, outer, channels, inner, GIVEN(T, step), GIVEN(T, low), GIVEN(T, high),    \
                              below, above, inside, parallel, threads);                                               \
    }
UNIFORM(uniform_float32, float)
UNIFORM(uniform_float64, double)

#define MASKED(NAME, T, FUNCTION)                                                                                     \
    EXPORT int NAME(const T* grad, const uint8_t* bits, T* out, int64_t n, void* parallel, int threads) {              \
        tq::by_bits<T>(grad, bits, out, n, parallel, threads, FUNCTION);                                               \
        return 0;                                                                                                     \
    }
MASKED(masked_float32, float, [](float grad, int bit) { return grad * float(bit); })
MASKED(masked_float64, double, [](double grad, int bit) { return grad * double(bit); })
MASKED(masked_float16, uint16_t, (tq::MaskedHalf{0x7C00, 0x7E00}))
MASKED(masked_bfloat16, uint16_t, (tq::MaskedHalf{0x7F80, 0x7FC0}))
