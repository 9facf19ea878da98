// Formats of a few fixed numbers times a scale: signs, ternary, powers of two, mini-floats; value and mask in one pass.
#include "forms.h"
#include "slices.h"

namespace tq {

struct Request {
    const float* x;
    float* out;
    uint8_t* bits;                    // nullptr: no mask
    const float *scales, *others, *thirds;  // the numbers of channels; nullptr if the form has fewer
    float low, high;                  // what x is clamped to; -infinity and infinity: nothing
    float below, above;               // where the mask is 0 as well; NaN: nowhere
    bool inside;
};

template <bool MASK, typename Form, typename Numbers>
static void project_run(const Form form, const Request& asked, const float* __restrict x, float* __restrict out,
                        int32_t* __restrict flags, int64_t n, Numbers scale, Numbers other, Numbers third) {
    const float low = asked.low, high = asked.high, below = asked.below, above = asked.above;
    const int32_t any = asked.inside ? 0 : -1;
    for (int64_t i = 0; i < n; ++i) {
        const float v = clamped(x[i], low, high);
        out[i] = form.value(v, scale[i], other[i], third[i]);
        if (MASK)
            flags[i] = (any | -int32_t(form.is_inside(v, scale[i], other[i], third[i]))) & -int32_t(!(x[i] <= below)) &
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
                              of(asked.others), of(asked.thirds));
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
        const float *others, const float *thirds, double low, double high, double below, double above, int inside
#define PROJECT(FORM)                                                                                                  \
    return tq::project(FORM,                                                                                           \
                       {x, out, bits, scales, others, thirds, float(low), float(high), float(below), float(above), inside != 0}, \
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

EXPORT int midrise_float32(ASKED, double lowest, double highest, void* parallel, int threads) {
    PROJECT((tq::Midrise<false>{float(lowest), float(highest)}));
}

EXPORT int shifted_midrise_float32(ASKED, double lowest, double highest, void* parallel, int threads) {
    PROJECT((tq::Midrise<true>{float(lowest), float(highest)}));
}
