// What range observers measure.
#include "ends.h"
#include "steps.h"

namespace tq {

// The ends of each channel.
template <typename T>
static int min_max(const T* x, T* low, T* high, Walk walk, void* parallel, int threads) {
    std::atomic<int> failed{0};
    std::atomic_flag lock = ATOMIC_FLAG_INIT;
    for (int64_t c = 0; c < walk.channels; ++c) low[c] = T(INFINITY), high[c] = -T(INFINITY);
    in_chunks(walk.n(), parallel, threads, [&](int64_t first, int64_t last) {
        Rows<T> own(2, walk.channels);
        if (own.is_missing()) {
            failed = 1;
            return;
        }
        T* __restrict lows = own[0];
        T* __restrict highs = own[1];
        for (int64_t c = 0; c < walk.channels; ++c) lows[c] = T(INFINITY), highs[c] = -T(INFINITY);
        walk.run(first, last, [&](bool is_across, int64_t c, int64_t at, int64_t n) {
            const T* __restrict from = x + at;
            if (!is_across) return widen(from, n, lows + c, highs + c);
            T *__restrict least = lows + c, *__restrict most = highs + c;
            for (int64_t i = 0; i < n; ++i) least[i] = lesser(least[i], from[i]), most[i] = greater(most[i], from[i]);
        });
        while (lock.test_and_set(std::memory_order_acquire)) {}
        for (int64_t c = 0; c < walk.channels; ++c) {
            low[c] = lesser(low[c], lows[c]);
            high[c] = greater(high[c], highs[c]);
        }
        lock.clear(std::memory_order_release);
    });
    return failed;
}

template <typename T>
int track(const T* x, T* low, T* high, T* weight, Walk walk, double least, double most, Average average, void* parallel,
          int threads) {
    const int64_t channels = walk.channels;
    Rows<T> found(2, channels);
    if (found.is_missing()) return 1;
    T *lows = found[0], *highs = found[1];
    if (min_max(x, lows, highs, walk, parallel, threads)) return 1;
    const bool is_observed = *weight > 0;
    for (int64_t i = 0; i < 2 * channels; ++i) {
        T* end = lows + i;
        if (average.joins && is_observed) *end = i < channels ? lesser(*end, low[i]) : greater(*end, high[i - channels]);
        *end = *end < T(least) ? T(least) : *end;
        *end = *end > T(most) ? T(most) : *end;
        if (!std::isfinite(*end)) return NOT_FINITE;
    }
    const double seen = *weight > 0 ? double(*weight) : 0.0;
    const double momentum = average.starts_at_first && !is_observed ? 0.0 : average.momentum;
    const double sum = seen * average.momentum + (1.0 - momentum), rate = (1.0 - momentum) / sum;
    for (int64_t i = 0; i < 2 * channels; ++i) {
        T* held = i < channels ? low + i : high + (i - channels);
        const bool copies = average.copies && rate == 1.0;
        *held = copies ? lows[i] : T(double(*held) * (1.0 - rate) + double(lows[i]) * rate);
    }
    *weight = T(sum);
    return 0;
}

template int track(const float*, float*, float*, float*, Walk, double, double, Average, void*, int);
template int track(const double*, double*, double*, double*, Walk, double, double, Average, void*, int);

}  // namespace tq

#define TRACK(NAME, T)                                                                                                \
    EXPORT int NAME(const T* x, T* low, T* high, T* weight, WALK, double least, double most, double momentum,         \
                    int starts_at_first, int joins, int copies, void* parallel, int threads) {                        \
        return tq::track<T>(x, low, high, weight, THE_WALK, least, most,                                              \
                            {momentum, starts_at_first != 0, joins != 0, copies != 0}, parallel, threads);            \
    }
TRACK(track_float32, float)
TRACK(track_float64, double)

#define MIN_MAX(NAME, T)                                                                                              \
    EXPORT int NAME(const T* x, T* low, T* high, WALK, void* parallel, int threads) {                                 \
        return tq::min_max<T>(x, low, high, THE_WALK, parallel, threads);                                             \
    }
MIN_MAX(min_max_float32, float)
MIN_MAX(min_max_float64, double)
