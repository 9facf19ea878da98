// Grids whose step, offset or upper end is learned: the value in one pass, and all gradients in another one.
#include "slices.h"

namespace tq {

enum Rule {
    CLAMPED_FIRST,  // LSQ: round(clamp(x / step))
    ROUNDED_FIRST,  // TQT: clamp(round(x / step)); the rounded code decides what is clipped
    CALIBRATED,     // PACT with the rounding error in the gradient of its upper end, which is in place of the step
};

// As torch.clamp: NaN stays NaN, and a zero keeps its sign.
template <typename T>
static inline T clamped(T v, T low, T high) {
    v = v < low ? low : v;
    return v > high ? high : v;
}

// Sums over the elements of each channel, which do not depend on the number of threads: those of GRAIN elements each are
// kept until all are there. At most eight numbers are added as T, the others as double.
template <typename T>
struct Sums {
    Layout layout;
    T* totals;  // nullptr: nobody wants them
    double* kept;

    Sums(const Layout& layout, T* totals) : layout(layout), totals(totals), kept(nullptr) {
        if (totals == nullptr) return;
        kept = static_cast<double*>(std::calloc(place(grains()) + layout.channels, sizeof(double)));
    }
    ~Sums() { std::free(kept); }
    Sums(const Sums&) = delete;

    bool is_lost() const { return totals != nullptr && kept == nullptr; }
    int64_t grains() const { return (layout.numel() + GRAIN - 1) / GRAIN; }

    // The first channel of a grain, and where its sums are; with one slice a channel a grain has few channels.
    int64_t first(int64_t grain) const { return layout.outer > 1 ? 0 : grain * GRAIN / layout.inner; }
    int64_t place(int64_t grain) const { return layout.outer > 1 ? grain * layout.channels : first(grain) + grain; }

    // Of up to BLOCK numbers.
    __attribute__((noinline)) static double sum(const T* numbers, int64_t n) {
        constexpr int64_t WIDTH = 32 / sizeof(T), LANES = 4 * WIDTH;
        typedef T Vector __attribute__((vector_size(32), aligned(sizeof(T))));
        double wide[LANES] = {};
        int64_t i = 0;
        while (i + LANES <= n) {
            Vector lanes[4] = {};
            for (int64_t end = i + 8 * LANES; i < end && i + LANES <= n; i += LANES) {
                const Vector* own = reinterpret_cast<const Vector*>(numbers + i);
                lanes[0] += own[0];
                lanes[1] += own[1];
                lanes[2] += own[2];
                lanes[3] += own[3];
            }
            for (int64_t k = 0; k < LANES; ++k) wide[k] += double(lanes[k / WIDTH][k % WIDTH]);
        }
        double total = 0.0;
        for (int64_t k = 0; i > 0 && k < LANES; ++k) total += wide[k];
        for (; i < n; ++i) total += double(numbers[i]);
        return total;
    }

    void add(int64_t at, const T* numbers, int64_t n, OfOne of) {
        if (totals != nullptr) kept[place(at / GRAIN) - first(at / GRAIN) + of.channel] += sum(numbers, n);
    }

    void add(int64_t at, const T* numbers, int64_t n, OfEach of) {
        if (totals == nullptr) return;
        double* own = kept + (place(at / GRAIN) - first(at / GRAIN) + of.channel);
        for (int64_t i = 0; i < n; ++i) own[i] += double(numbers[i]);
    }

    void join() const {
        if (totals == nullptr) return;
        double* sums = kept + place(grains());
        for (int64_t grain = 0; grain < grains(); ++grain) {
            const int64_t from = first(grain), begin = place(grain);
            const int64_t end = from + place(grain + 1) - begin;
            for (int64_t c = from; c < end && c < layout.channels; ++c) sums[c] += kept[begin + c - from];
        }
        for (int64_t c = 0; c < layout.channels; ++c) totals[c] = T(sums[c]);
    }
};

template <typename T>
struct Grid {
    const T *steps, *offsets;  // of channels
    T low, high;
};

template <typename T>
struct Gradients {
    const T *grad, *delta;  // delta: one number; nullptr: the gradient passes as it is
    T* for_x;
    T *for_steps, *for_offsets;  // of channels; nullptr: not wanted, as for_x
};

template <typename T, bool SHIFTS, typename Step, typename Offset>
static void project_run(const T* __restrict x, T* __restrict y, int64_t n, T low, T high, Step step, Offset offset) {
    for (int64_t i = 0; i < n; ++i) {
        const T scaled = (SHIFTS ? x[i] - offset[i] : x[i]) / step[i];
        const T code = std::rint(clamped(scaled, low, high));
        y[i] = SHIFTS ? code * step[i] + offset[i] : code * step[i];
    }
}

// The gradient of x, and what each element adds to that of the step.
template <typename T, Rule RULE, bool LEANS, typename Step, typename Offset>
static void differentiate_run(const T* __restrict x, const T* __restrict grad, T* __restrict for_x,
                              T* __restrict for_step, int64_t n, T low, T high, T delta, Step step, Offset offset) {
    const T unit = T(2.0 / (double(high) - double(low))), margin = RULE == ROUNDED_FIRST ? T(0.5) : T(0);
    for (int64_t i = 0; i < n; ++i) {
        const T scaled = (x[i] - offset[i]) / step[i];
        if (RULE == CALIBRATED) {
            const T above = T(x[i] >= step[i]), not_below = T(x[i] >= T(0)), share = clamped(scaled, T(0), T(1));
            for_x[i] = grad[i] * (not_below - above);
            for_step[i] = grad[i] * (above + std::rint(share * high) / high - share);
            continue;
        }
        const T rounded = std::rint(scaled), kept = clamped(scaled, low, high);
        const T code = RULE == ROUNDED_FIRST ? clamped(rounded, low, high) : std::rint(kept);
        const T judged = RULE == ROUNDED_FIRST ? rounded : scaled;
        const bool inside = (judged > low - margin) & (judged < high + margin);
        const T sign = T(grad[i] > T(0)) - T(grad[i] < T(0));
        const T passed = LEANS ? grad[i] * (T(1) + delta * sign * ((kept - code) * unit)) : grad[i];
        for_x[i] = inside ? passed : T(0);
        for_step[i] = (code - (inside ? scaled : T(0))) * grad[i];
    }
}

template <typename T, bool SHIFTS>
static int project(const T* x, T* y, const Layout& layout, const Grid<T>& grid, void* parallel, int threads) {
    expect_writes(y, layout.numel() * int64_t(sizeof(T)));
    in_chunks(layout.numel(), parallel, threads, [&](int64_t first, int64_t last) {
        in_runs(layout, first, last, [&](int64_t at, int64_t n, auto of) {
            project_run<T, SHIFTS>(x + at, y + at, n, grid.low, grid.high, of(grid.steps), of(grid.offsets));
        });
    });
    return 0;
}

template <typename T, Rule RULE, bool LEANS>
static int differentiate(const T* x, const Layout& layout, const Grid<T>& grid, const Gradients<T>& out,
                         void* parallel, int threads) {
    Sums<T> steps(layout, out.for_steps), offsets(layout, out.for_offsets);
    if (steps.is_lost() || offsets.is_lost()) return 1;
    if (out.for_x != nullptr) expect_writes(out.for_x, layout.numel() * int64_t(sizeof(T)));
    const T delta = LEANS ? *out.delta : T(0);
    in_grains(layout, parallel, threads, [&](int64_t at, int64_t n, auto of) {
        T kept[BLOCK], added[BLOCK];
        T* for_x = out.for_x == nullptr ? kept : out.for_x + at;
        differentiate_run<T, RULE, LEANS>(x + at, out.grad + at, for_x, added, n, grid.low, grid.high, delta,
                                          of(grid.steps), of(grid.offsets));
        steps.add(at, added, n, of);
        if (out.for_offsets == nullptr) return;
        for (int64_t i = 0; i < n; ++i) added[i] = out.grad[at + i] - for_x[i];
        offsets.add(at, added, n, of);
    });
    steps.join();
    offsets.join();
    return 0;
}

// PACT: the value, and one bit an element where 0 <= x < end, and another one where x >= end.
template <typename T>
static int clip(const T* x, T* y, uint8_t* inside, uint8_t* above, const Layout& layout, const T* steps, const T* ends,
                T n_steps, void* parallel, int threads) {
    expect_writes(y, layout.numel() * int64_t(sizeof(T)));
    in_chunks(layout.numel(), parallel, threads, [&](int64_t first, int64_t last) {
        Flag<T> is_inside[BLOCK], is_above[BLOCK];
        for (int64_t block = first; block < last; block += BLOCK) {
            const int64_t end = block + BLOCK < last ? block + BLOCK : last;
            in_runs(layout, block, end, [&](int64_t at, int64_t n, auto of) {
                const auto upper = of(ends);
                const T* own = x + at;
                project_run<T, false>(own, y + at, n, T(0), n_steps, of(steps), upper);
                Flag<T>*__restrict here = is_inside + (at - block), *__restrict beyond = is_above + (at - block);
                for (int64_t i = 0; i < n; ++i) {
                    beyond[i] = -Flag<T>(own[i] >= upper[i]);
                    here[i] = -Flag<T>(own[i] >= T(0)) & ~beyond[i];
                }
            });
            pack(is_inside, inside + block / 8, end - block);
            pack(is_above, above + block / 8, end - block);
        }
    });
    return 0;
}

// n elements of `grad` times their bits in a packed mask, from the one at `at` on.
template <typename T>
static void masked_run(const T* __restrict grad, const uint8_t* bits, int64_t at, T* __restrict out, int64_t n) {
    const auto bit = [=](int64_t i) { return T(bits[i / 8] >> i % 8 & 1); };
    int64_t i = 0;
    for (; i < n && (at + i) % 8 != 0; ++i) out[i] = grad[i] * bit(at + i);
    for (; i + 8 <= n; i += 8) {
        const int byte = bits[(at + i) / 8];
        for (int k = 0; k < 8; ++k) out[i + k] = grad[i + k] * T(byte >> k & 1);
    }
    for (; i < n; ++i) out[i] = grad[i] * bit(at + i);
}

template <typename T>
static int differentiate_clip(const T* grad, const uint8_t* inside, const uint8_t* above, const Layout& layout, T* for_x,
                              T* for_ends, void* parallel, int threads) {
    Sums<T> ends(layout, for_ends);
    if (ends.is_lost()) return 1;
    if (for_x != nullptr) expect_writes(for_x, layout.numel() * int64_t(sizeof(T)));
    in_grains(layout, parallel, threads, [&](int64_t at, int64_t n, auto of) {
        T for_end[BLOCK];
        if (for_x != nullptr) masked_run(grad + at, inside, at, for_x + at, n);
        if (for_ends == nullptr) return;
        masked_run(grad + at, above, at, for_end, n);
        ends.add(at, for_end, n, of);
    });
    ends.join();
    return 0;
}

}  // namespace tq

#define LEARNED(DTYPE, T)                                                                                              \
    EXPORT int learned_step_##DTYPE(const T* x, T* y, int64_t outer, int64_t channels, int64_t inner, const T* steps,  \
                                    const T* offsets, double low, double high, void* parallel, int threads) {          \
        auto run = offsets != nullptr ? tq::project<T, true> : tq::project<T, false>;                                  \
        return run(x, y, {outer, channels, inner}, {steps, offsets, T(low), T(high)}, parallel, threads);              \
    }                                                                                                                  \
    EXPORT int learned_step_backward_##DTYPE(const T* x, const T* grad, T* for_x, T* for_steps,                   \
                                             T* for_offsets, int64_t outer, int64_t channels, int64_t inner,      \
                                             const T* steps, const T* offsets, const T* delta, double low,             \
                                             double high, void* parallel, int threads) {                               \
        auto run = delta == nullptr ? tq::differentiate<T, tq::CLAMPED_FIRST, false>                                   \
                                    : tq::differentiate<T, tq::CLAMPED_FIRST, true>;                                   \
        return run(x, {outer, channels, inner}, {steps, offsets, T(low), T(high)},                                     \
                   {grad, delta, for_x, for_steps, for_offsets}, parallel, threads);                                   \
    }                                                                                                                  \
    EXPORT int rounded_step_backward_##DTYPE(const T* x, const T* grad, T* for_x, T* for_steps, int64_t outer,    \
                                             int64_t channels, int64_t inner, const T* steps, const T* offsets,        \
                                             double low, double high, void* parallel, int threads) {                   \
        return tq::differentiate<T, tq::ROUNDED_FIRST, false>(                                                         \
            x, {outer, channels, inner}, {steps, offsets, T(low), T(high)}, {grad, nullptr, for_x, for_steps, nullptr},\
            parallel, threads);                                                                                        \
    }                                                                                                                  \
    EXPORT int calibrated_clip_backward_##DTYPE(const T* x, const T* grad, T* for_x, T* for_ends, int64_t outer,  \
                                                int64_t channels, int64_t inner, const T* ends, const T* offsets,      \
                                                double n_steps, void* parallel, int threads) {                         \
        return tq::differentiate<T, tq::CALIBRATED, false>(                                                            \
            x, {outer, channels, inner}, {ends, offsets, T(0), T(n_steps)}, {grad, nullptr, for_x, for_ends, nullptr}, \
            parallel, threads);                                                                                        \
    }                                                                                                                  \
    EXPORT int clip_##DTYPE(const T* x, T* y, uint8_t* inside, uint8_t* above, int64_t outer, int64_t channels,        \
                            int64_t inner, const T* steps, const T* ends, double n_steps, void* parallel,              \
                            int threads) {                                                                             \
        return tq::clip<T>(x, y, inside, above, {outer, channels, inner}, steps, ends, T(n_steps), parallel, threads); \
    }                                                                                                                  \
    EXPORT int clip_backward_##DTYPE(const T* grad, const uint8_t* inside, const uint8_t* above, T* for_x,             \
                                     T* for_ends, int64_t outer, int64_t channels, int64_t inner, void* parallel, \
                                     int threads) {                                                                    \
        return tq::differentiate_clip<T>(grad, inside, above, {outer, channels, inner}, for_x, for_ends, parallel,     \
                                         threads);                                                                     \
    }
LEARNED(float32, float)
LEARNED(float64, double)
