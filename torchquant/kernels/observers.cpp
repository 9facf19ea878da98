// What range observers count and measure.
#include "common.h"

namespace tq {

constexpr int TABLES = 4;  // equal neighbours, such as zeros, are counted in different tables and need not wait

// Add the numbers of n elements in each bin to `counts`, and how many are 0 to `n_zeros` if it is given.
template <typename T>
static void count(const T* x, int64_t n, T low, T scale, int64_t n_bins, uint32_t* tables, int64_t* counts,
                  int64_t* n_zeros) {
    const bool is_short = n < TABLES * n_bins;
    const T top = T(n_bins - 1);
    int32_t index[BLOCK];
    int64_t zeros = 0;
    if (!is_short) std::memset(tables, 0, TABLES * n_bins * sizeof(uint32_t));
    for (int64_t block = 0; block < n; block += BLOCK) {
        const int64_t size = block + BLOCK < n ? BLOCK : n - block;
        const T* __restrict from = x + block;
        Flag<T> here = 0;
        for (int64_t i = 0; i < size; ++i) {
            T place = (from[i] - low) * scale;
            place = place > 0 ? place : T(0);
            place = place > top ? top : place;
            index[i] = int32_t(place);
        }
        for (int64_t i = 0; i < size; ++i) here += from[i] == 0;
        zeros += here;
        if (is_short) {
            for (int64_t i = 0; i < size; ++i) __atomic_fetch_add(counts + index[i], 1, __ATOMIC_RELAXED);
            continue;
        }
        int64_t i = 0;
        for (; i + TABLES <= size; i += TABLES) {
            for (int table = 0; table < TABLES; ++table) ++tables[table * n_bins + index[i + table]];
        }
        for (; i < size; ++i) ++tables[index[i]];
    }
    if (!is_short) {
        for (int64_t bin = 0; bin < n_bins; ++bin) {
            int64_t sum = 0;
            for (int table = 0; table < TABLES; ++table) sum += tables[table * n_bins + bin];
            if (sum != 0) __atomic_fetch_add(counts + bin, sum, __ATOMIC_RELAXED);
        }
    }
    if (n_zeros != nullptr) __atomic_fetch_add(n_zeros, zeros, __ATOMIC_RELAXED);
}

template <typename T>
static int histogram(const T* x, int64_t* counts, int64_t* zeros, Walk walk, Number<T> low, Number<T> scale,
                     int64_t n_bins, void* parallel, int threads) {
    std::atomic<int> failed{0};
    in_chunks(walk.n(), parallel, threads, [&](int64_t first, int64_t last) {
        uint32_t* tables = static_cast<uint32_t*>(std::malloc(TABLES * n_bins * sizeof(uint32_t)));
        if (tables == nullptr) {
            failed = 1;
            return;
        }
        walk.run(first, last, [&](bool, int64_t c, int64_t at, int64_t n) {
            constexpr int64_t MOST = int64_t(1) << 32;  // that a table can count
            for (int64_t done = 0; done < n; done += MOST) {
                count(x + at + done, n - done < MOST ? n - done : MOST, low.of(c), scale.of(c), n_bins, tables,
                      counts + c * n_bins, zeros == nullptr ? nullptr : zeros + c);
            }
        });
        std::free(tables);
    });
    return failed;
}

// Move the ends of one channel apart to include n elements, in lanes that a compiler makes vectors of.
template <typename T>
static void widen(const T* x, int64_t n, T* low, T* high) {
    constexpr int64_t LANES = 32;
    if (n < 2 * LANES) {
        for (int64_t i = 0; i < n; ++i) *low = lesser(*low, x[i]), *high = greater(*high, x[i]);
        return;
    }
    T lows[LANES], highs[LANES];
    for (int64_t k = 0; k < LANES; ++k) lows[k] = *low, highs[k] = *high;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        for (int64_t k = 0; k < LANES; ++k) {
            lows[k] = lesser(lows[k], x[i + k]);
            highs[k] = greater(highs[k], x[i + k]);
        }
    }
    for (; i < n; ++i) lows[0] = lesser(lows[0], x[i]), highs[0] = greater(highs[0], x[i]);
    for (int64_t k = 0; k < LANES; ++k) *low = lesser(*low, lows[k]), *high = greater(*high, highs[k]);
}

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

// How a range takes in the ends of one more tensor.
struct Average {
    double momentum;
    bool starts_at_first;  // the first tensor counts alone
    bool joins;            // the range never shrinks
    bool copies;           // a full rate copies the ends, which keeps the sign of zero, as for rows of numbers
};

// Take the ends of a tensor, clamped, into the range of each channel and its weight. Returns 2, and changes nothing, if
// an end is not finite.
template <typename T>
static int track(const T* x, T* low, T* high, T* weight, Walk walk, double least, double most, Average average,
                 void* parallel, int threads) {
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
        if (!std::isfinite(*end)) return 2;
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

#define HISTOGRAM(NAME, T)                                                                                            \
    EXPORT int NAME(const T* x, int64_t* counts, int64_t* zeros, WALK, NUMBER(T, low), NUMBER(T, scale),              \
                    int64_t n_bins, void* parallel, int threads) {                                                    \
        return tq::histogram<T>(x, counts, zeros, THE_WALK, GIVEN(T, low), GIVEN(T, scale), n_bins, parallel,         \
                                threads);                                                                             \
    }
HISTOGRAM(histogram_float32, float)
HISTOGRAM(histogram_float64, double)
