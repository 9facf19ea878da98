// Formats of a few fixed numbers times a scale: signs, ternary, powers of two, mini-floats; value and mask in one pass.
#include "slices.h"

namespace tq {

static const float INF = __builtin_inff();

static inline float clamped(float v, float low, float high) {  // as torch.clamp: NaN stays NaN, a zero keeps its sign
    v = v < low ? low : v;
    return v > high ? high : v;
}

static inline uint32_t bits_of(float v) {
    uint32_t bits;
    std::memcpy(&bits, &v, sizeof bits);
    return bits;
}

static inline float of_bits(uint32_t bits) {
    float v;
    std::memcpy(&v, &bits, sizeof v);
    return v;
}

// The largest power of two not above |v|, 0 for subnormal v, infinity for NaN.
static inline float floor_pow2(float v) { return of_bits(bits_of(v) & 0x7F800000u); }

// 1 / v for a power of two from 2**-126 to 2**126.
static inline float reciprocal(float v) { return of_bits((254u << 23) - bits_of(v)); }

struct Signs {
    float value(float v, float scale, float) const {
        return ((clamped(v, 0.0f, 0.0f) + float(v >= 0.0f)) * 2.0f - 1.0f) * scale;
    }
    bool is_inside(float v, float scale, float) const { return std::fabs(v) <= 1.5f * scale; }
};

struct Ternary {
    float value(float v, float scale, float threshold) const {
        const float sign = float(v > 0.0f) - float(v < 0.0f), zero_or_nan = clamped(v, 0.0f, 1.0f) * 0.0f;
        return (float(std::fabs(v) > threshold) * sign + zero_or_nan) * scale;
    }
    bool is_inside(float v, float scale, float) const { return std::fabs(v) <= 1.5f * scale; }
};

struct PowersOfTwo {
    float largest;

    float value(float v, float scale, float) const {
        const float scaled = std::fabs(v) / (scale > 0.0f ? scale : 1.0f);
        const float magnitude = clamped(floor_pow2(scaled / 1.5f) * 2.0f, 1.0f, largest);
        return (magnitude + clamped(scaled, 0.0f, 1.0f) * 0.0f) * (v >= 0.0f ? 1.0f : -1.0f) * scale;
    }
    bool is_inside(float v, float scale, float) const { return std::fabs(v) <= scale * largest; }
};

template <bool SHIFTS>
struct Floats {
    float smallest_normal, largest_power, fraction, largest;  // fraction: 2**-mantissa_bits

    float centred(float v, float shift) const { return SHIFTS ? v - shift : v; }
    float value(float v, float scale, float shift) const {
        const float scaled = centred(v, shift) / scale;
        const float spacing = clamped(floor_pow2(scaled), smallest_normal, largest_power) * fraction;
        const float nearest = std::rint(scaled * reciprocal(spacing)) * spacing;
        const float value = clamped(nearest, -largest, largest) * scale;
        return SHIFTS ? value + shift : value;
    }
    bool is_inside(float v, float scale, float shift) const { return std::fabs(centred(v, shift)) <= scale * largest; }
};

struct Request {
    const float* x;
    float* out;
    uint8_t* bits;                    // nullptr: no mask
    const float *scales, *others;     // of channels; others: thresholds or shifts, nullptr if there are none
    float low, high;                  // what x is clamped to; -infinity and infinity: nothing
    float below, above;               // where the mask is 0 as well; NaN: nowhere
    bool inside;
};

template <bool MASK, typename Form, typename Scale, typename Other>
static void project_run(const Form form, const Request& asked, const float* __restrict x, float* __restrict out,
                        int32_t* __restrict flags, int64_t n, Scale scale, Other other) {
    const float low = asked.low, high = asked.high, below = asked.below, above = asked.above;
    const int32_t any = asked.inside ? 0 : -1;
    for (int64_t i = 0; i < n; ++i) {
        const float v = clamped(x[i], low, high);
        out[i] = form.value(v, scale[i], other[i]);
        if (MASK)
            flags[i] = (any | -int32_t(form.is_inside(v, scale[i], other[i]))) & -int32_t(!(x[i] <= below)) &
                       -int32_t(!(x[i] >= above));
    }
}

template <bool MASK, typename Form>
static void project_part(const Form& form, const Request& asked, const Layout& layout, int64_t first, int64_t last) {
    int32_t flags[BLOCK];
    for (int64_t block = first; block < last; block += BLOCK) {
        const int64_t end = block + BLOCK < last ? block + BLOCK : last;
        in_runs(layout, block, end, [&](int64_t at, int64_t n, auto of) {
            project_run<MASK>(form, asked, asked.x + at, asked.out + at, flags + (at - block), n, of(asked.scales),
                              of(asked.others));
        });
        if (MASK) pack(flags, asked.bits + block / 8, end - block);
    }
}

template <typename Form>
static int project(const Form& form, const Request& asked, const Layout& layout, void* parallel, int threads) {
    expect_writes(asked.out, layout.numel() * int64_t(sizeof(float)));
    in_chunks(layout.numel(), parallel, threads, [&](int64_t first, int64_t last) {
        if (asked.bits == nullptr) project_part<false>(form, asked, layout, first, last);
        else project_part<true>(form, asked, layout, first, last);
    });
    return 0;
}

}  // namespace tq

#define ASKED                                                                                                          \
    const float *x, float *out, uint8_t *bits, int64_t outer, int64_t channels, int64_t inner, const float *scales,    \
        const float *others, double low, double high, double below, double above, int inside
#define PROJECT(FORM)                                                                                                  \
    return tq::project(FORM,                                                                                           \
                       {x, out, bits, scales, others, float(low), float(high), float(below), float(above), inside != 0}, \
                       {outer, channels, inner}, parallel, threads)

EXPORT int signs_float32(ASKED, void* parallel, int threads) { PROJECT(tq::Signs{}); }

EXPORT int ternary_float32(ASKED, void* parallel, int threads) { PROJECT(tq::Ternary{}); }

EXPORT int powers_of_two_float32(ASKED, double largest, void* parallel, int threads) {
    PROJECT(tq::PowersOfTwo{float(largest)});
}

EXPORT int floats_float32(ASKED, double smallest_normal, double largest_power, double fraction, double largest,
                          void* parallel, int threads) {
    PROJECT((tq::Floats<false>{float(smallest_normal), float(largest_power), float(fraction), float(largest)}));
}

EXPORT int shifted_floats_float32(ASKED, double smallest_normal, double largest_power, double fraction, double largest,
                                  void* parallel, int threads) {
    PROJECT((tq::Floats<true>{float(smallest_normal), float(largest_power), float(fraction), float(largest)}));
}
