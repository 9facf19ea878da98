// What range observers count.
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

}  // namespace tq

#define HISTOGRAM(NAME, T)                                                                                            \
    EXPORT int NAME(const T* x, int64_t* counts, int64_t* zeros, WALK, NUMBER(T, low), NUMBER(T, scale),              \
                    int64_t n_bins, void* parallel, int threads) {                                                    \
        return tq::histogram<T>(x, counts, zeros, THE_WALK, GIVEN(T, low), GIVEN(T, scale), n_bins, parallel,         \
                                threads);                                                                             \
    }
HISTOGRAM(histogram_float32, float)
HISTOGRAM(histogram_float64, double)
