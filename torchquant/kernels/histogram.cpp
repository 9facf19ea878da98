// How many elements of each row lie in each of equal bins, for observers that choose a range from all data seen.
#include <limits>

#include "ends.h"

namespace tq {

constexpr int TABLES = 4;  // equal neighbours are counted in different tables and need not wait

#if TQ_AVX2
// The places of the flags that are set in a byte, from the lowest, one byte each.
struct Places {
    uint64_t of[256] = {};
    constexpr Places() {
        for (int flags = 0; flags < 256; ++flags) {
            int n = 0;
            for (int k = 0; k < 8; ++k) {
                if (flags >> k & 1) of[flags] |= uint64_t(k) << 8 * n++;
            }
        }
    }
};
static constexpr Places PLACES;
#endif

// Equal bins from low on; elements are placed by their magnitudes if MAGNITUDE.
template <typename T, bool MAGNITUDE>
struct EqualBins {
    T low, scale, top;

    int32_t of(T x) const {
        T place = ((MAGNITUDE ? std::fabs(x) : x) - low) * scale;
        place = place > 0 ? place : T(0);
        return int32_t(place > top ? top : place);
    }

    // Write the bins of those of n elements that are not 0, n at most BLOCK; `bins` has room for 8 more. Returns how
    // many there are.
    int64_t of_nonzero(const T* __restrict x, int64_t n, int32_t* __restrict bins) const {
        for (int64_t i = 0; i < n; ++i) bins[i] = of(x[i]);
        int64_t found = 0;
        for (int64_t i = 0; i < n; ++i) {
            bins[found] = bins[i];
            found += x[i] != 0;
        }
        return found;
    }
};

#if TQ_AVX2
template <bool MAGNITUDE>
struct EightBins : EqualBins<float, MAGNITUDE> {
    int64_t of_nonzero(const float* x, int64_t n, int32_t* bins) const {
        const __m256 low = _mm256_set1_ps(this->low), scale = _mm256_set1_ps(this->scale);
        const __m256 top = _mm256_set1_ps(this->top), zero = _mm256_setzero_ps(), sign = _mm256_set1_ps(-0.0f);
        int64_t found = 0, i = 0;
        for (; i + 8 <= n; i += 8) {
            __m256 from = _mm256_loadu_ps(x + i);
            const int flags = _mm256_movemask_ps(_mm256_cmp_ps(from, zero, _CMP_NEQ_UQ));
            if (MAGNITUDE) from = _mm256_andnot_ps(sign, from);
            __m256 place = _mm256_mul_ps(_mm256_sub_ps(from, low), scale);
            place = _mm256_min_ps(top, _mm256_max_ps(place, zero));  // NaN becomes 0, as above
            const __m256i places = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(int64_t(PLACES.of[flags])));
            const __m256i bin = _mm256_permutevar8x32_epi32(_mm256_cvttps_epi32(place), places);
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(bins + found), bin);
            found += __builtin_popcount(flags);
        }
        for (; i < n; ++i) {
            bins[found] = this->of(x[i]);
            found += x[i] != 0;
        }
        return found;
    }
};
template <typename T, bool MAGNITUDE> struct BinsOf { typedef EqualBins<T, MAGNITUDE> type; };
template <bool MAGNITUDE> struct BinsOf<float, MAGNITUDE> { typedef EightBins<MAGNITUDE> type; };
#else
template <typename T, bool MAGNITUDE> struct BinsOf { typedef EqualBins<T, MAGNITUDE> type; };
#endif

struct Ends {
    double low, high;

    // Whether two other ends are within these; NaN is not.
    template <typename T>
    bool include(const T* ends) const { return double(ends[0]) >= low && double(ends[1]) <= high; }
};

// Count a part of a row: the numbers of its elements in each bin, those that are 0 apart. If `ends` is given, it is
// moved apart to include the part, and counting stops behind the first block that is not within `seen`, or has a NaN.
template <typename T, typename Bins>
static void count(const T* x, int64_t n, const Bins& bins, int64_t n_bins, uint32_t* tables, int64_t* counts,
                  int64_t* n_zeros, Ends seen, T* ends) {
    const bool is_short = n < TABLES * n_bins;
    int32_t index[BLOCK + 8];
    int64_t zeros = 0;
    bool is_within = true;
    const auto add = [&](const int32_t* index, int64_t n) {
        int64_t i = 0;
        for (; !is_short && i + TABLES <= n; i += TABLES) {
            for (int table = 0; table < TABLES; ++table) ++tables[table * n_bins + index[i + table]];
        }
        for (; i < n; ++i) {
            if (is_short) __atomic_fetch_add(counts + index[i], 1, __ATOMIC_RELAXED);
            else ++tables[index[i]];
        }
    };
    if (!is_short) std::memset(tables, 0, TABLES * n_bins * sizeof(uint32_t));
    for (int64_t block = 0; block < n; block += BLOCK) {
        const int64_t size = block + BLOCK < n ? BLOCK : n - block;
        if (is_within) {
            const int64_t found = bins.of_nonzero(x + block, size, index);
            zeros += size - found;
            add(index, found);
        }
        if (ends == nullptr) continue;
        widen(x + block, size, ends, ends + 1);  // once the block is in the cache, where this takes little
        is_within = is_within && seen.include(ends);
    }
    for (int64_t bin = 0; !is_short && is_within && bin < n_bins; ++bin) {
        int64_t sum = 0;
        for (int table = 0; table < TABLES; ++table) sum += tables[table * n_bins + bin];
        if (sum != 0) __atomic_fetch_add(counts + bin, sum, __ATOMIC_RELAXED);
    }
    __atomic_fetch_add(n_zeros, zeros, __ATOMIC_RELAXED);
}

// Rows of n elements, and the bins of each.
template <typename T, bool MAGNITUDE>
struct Histogram {
    typedef typename BinsOf<T, MAGNITUDE>::type Bins;
    const T* x;
    int64_t n_rows, n;
    const T *low, *scale;
    int64_t n_bins;

    Bins bins(int64_t row) const {
        Bins bins;
        bins.low = low[row], bins.scale = scale[row], bins.top = T(n_bins - 1);
        return bins;
    }

    // Add the counts of all rows to `sums`; if `ends` is given, find those of each row, and add only if all rows are
    // within `seen`, lower ends and then upper ones.
    int add_to(double* sums, const double* seen, T* ends, bool with_zeros, void* parallel, int threads) const {
        std::atomic<int> failed{0};
        std::atomic_flag lock = ATOMIC_FLAG_INIT;
        int64_t* counts = static_cast<int64_t*>(std::calloc(n_rows * (n_bins + 1), sizeof(int64_t)));
        if (counts == nullptr) return 1;
        int64_t* zeros = counts + n_rows * n_bins;
        for (int64_t i = 0; ends != nullptr && i < 2 * n_rows; ++i) ends[i] = i % 2 ? -T(INFINITY) : T(INFINITY);
        const auto known = [&](int64_t row) {
            return ends == nullptr ? Ends{0.0, 0.0} : Ends{seen[row], seen[n_rows + row]};
        };
        const auto part = [&](int64_t row, int64_t at, int64_t n, uint32_t* tables) {
            constexpr int64_t MOST = int64_t(1) << 32;  // that a table can count
            T own[2] = {T(INFINITY), -T(INFINITY)};
            for (int64_t done = 0; done < n; done += MOST) {
                count(x + at + done, n - done < MOST ? n - done : MOST, bins(row), n_bins, tables,
                      counts + row * n_bins, zeros + row, known(row), ends == nullptr ? nullptr : own);
            }
            if (ends == nullptr) return;
            while (lock.test_and_set(std::memory_order_acquire)) {}
            ends[2 * row] = lesser(ends[2 * row], own[0]);
            ends[2 * row + 1] = greater(ends[2 * row + 1], own[1]);
            lock.clear(std::memory_order_release);
        };
        in_chunks(n_rows * n, parallel, threads, [&](int64_t first, int64_t last) {
            uint32_t* tables = static_cast<uint32_t*>(std::malloc(TABLES * n_bins * sizeof(uint32_t)));
            if (tables == nullptr) failed = 1;
            for (int64_t at = first, size; tables != nullptr && at < last; at += size) {
                size = n - at % n < last - at ? n - at % n : last - at;
                part(at / n, at, size, tables);
            }
            std::free(tables);
        });
        bool is_within = !failed;
        for (int64_t row = 0; ends != nullptr && row < n_rows; ++row) {
            is_within = is_within && known(row).include(ends + 2 * row);
        }
        for (int64_t row = 0; is_within && row < n_rows; ++row) {
            int64_t* own = counts + row * n_bins;
            if (with_zeros) own[bins(row).of(T(0))] += zeros[row];
            for (int64_t bin = 0; bin < n_bins; ++bin) sums[row * n_bins + bin] += double(own[bin]);
        }
        std::free(counts);
        return failed;
    }
};

// Move the mass of each row to bins over another range, by the share of each old bin in each new one.
static void rebinned(const double* counts, double* out, int64_t n_rows, int64_t n_bins, const double* low,
                     const double* high, const double* new_low, const double* new_high) {
    for (int64_t row = 0; row < n_rows; ++row, counts += n_bins, out += n_bins) {
        const double scale = 1.0 / (high[row] - low[row]) * double(n_bins), width = new_high[row] - new_low[row];
        double mass = 0.0, before = 0.0;  // of the bins before `bin`, and below the last edge
        int64_t bin = 0;
        for (int64_t edge = 0; edge <= n_bins; ++edge) {
            const double at = new_low[row] + width * (double(edge) / double(n_bins));
            double place = (at - low[row]) * scale;
            place = place > 0 ? place : 0.0;
            place = place > double(n_bins) ? double(n_bins) : place;
            const int64_t last = place < double(n_bins) ? int64_t(place) : n_bins - 1;
            for (; bin < last; ++bin) mass += counts[bin];
            const double below = mass + (place - double(last)) * counts[last];
            if (edge > 0) out[edge - 1] = below - before;
            before = below;
        }
    }
}

// The first and last edge of the bins over the data between two ends.
static Ends edges(double low, double high, bool magnitude) {
    const double limit = std::numeric_limits<float>::max();
    const auto usable = [=](double end) { return end != end ? 0.0 : end < -limit ? -limit : end > limit ? limit : end; };
    low = usable(low), high = usable(high);
    if (magnitude) {
        high = -low > high ? -low : high;
        low = 0.0;
    }
    const double share = std::fabs(low) * 1e-6, margin = high > low ? 0.0 : share < 1e-6 ? 1e-6 : share;
    return Ends{magnitude ? low : low - margin, high + margin};
}

enum Outcome { ADDED, MOVED, REFUSED };

// Add a batch to the counts of the data seen. If it is not within their ends, these are moved apart, and `moved` gets
// the counts of all data in the bins between the new ones. REFUSED: a row has NaN or is infinite, and nothing changes.
template <typename T, bool MAGNITUDE>
static int batch(const T* x, int64_t n_rows, int64_t n, double* sums, double* moved, int64_t n_bins, double* seen,
                 int* outcome, bool with_zeros, void* parallel, int threads) {
    Rows<T> rows(4, n_rows);
    Rows<double> places(4, n_rows);
    if (rows.is_missing() || places.is_missing()) return 1;
    T *low = rows[0], *scale = rows[1], *ends = rows[2];
    const Histogram<T, MAGNITUDE> histogram{x, n_rows, n, low, scale, n_bins};
    const auto place_bins = [&](double* first, double* last) {
        for (int64_t row = 0; row < n_rows; ++row) {
            const Ends found = edges(seen[row], seen[n_rows + row], MAGNITUDE);
            const double most = std::numeric_limits<T>::max(), each = 1.0 / (found.high - found.low) * double(n_bins);
            first[row] = found.low, last[row] = found.high;
            low[row] = T(found.low), scale[row] = T(each > most ? most : each);
        }
    };
    place_bins(places[0], places[1]);
    if (histogram.add_to(sums, seen, ends, with_zeros, parallel, threads)) return 1;
    *outcome = ADDED;
    for (int64_t row = 0; row < n_rows; ++row) {
        if (!std::isfinite(double(ends[2 * row + 1]) - double(ends[2 * row]))) *outcome = REFUSED;
    }
    for (int64_t row = 0; *outcome != REFUSED && row < n_rows; ++row) {
        const double least = double(ends[2 * row]), most = double(ends[2 * row + 1]);
        if (least < seen[row]) *outcome = MOVED, seen[row] = least;
        if (most > seen[n_rows + row]) *outcome = MOVED, seen[n_rows + row] = most;
    }
    if (*outcome != MOVED) return 0;
    place_bins(places[2], places[3]);
    rebinned(sums, moved, n_rows, n_bins, places[0], places[1], places[2], places[3]);
    return histogram.add_to(moved, nullptr, nullptr, with_zeros, parallel, threads);
}

}  // namespace tq

#define HISTOGRAM(NAME, T)                                                                                            \
    EXPORT int NAME(const T* x, int64_t n_rows, int64_t n, const T* low, const T* scale, double* sums, int64_t n_bins,\
                    int with_zeros, int magnitude, void* parallel, int threads) {                                     \
        const auto add = [&](auto&& rows) {                                                                           \
            return rows.add_to(sums, nullptr, nullptr, with_zeros != 0, parallel, threads);                           \
        };                                                                                                            \
        if (magnitude) return add(tq::Histogram<T, true>{x, n_rows, n, low, scale, n_bins});                          \
        return add(tq::Histogram<T, false>{x, n_rows, n, low, scale, n_bins});                                        \
    }
HISTOGRAM(histogram_float32, float)
HISTOGRAM(histogram_float64, double)

#define BATCH(NAME, T)                                                                                                \
    EXPORT int NAME(const T* x, int64_t n_rows, int64_t n, double* sums, double* moved, int64_t n_bins, double* seen, \
                    int* outcome, int with_zeros, int magnitude, void* parallel, int threads) {                       \
        const auto run = magnitude ? tq::batch<T, true> : tq::batch<T, false>;                                        \
        return run(x, n_rows, n, sums, moved, n_bins, seen, outcome, with_zeros != 0, parallel, threads);             \
    }
BATCH(batch_float32, float)
BATCH(batch_float64, double)

EXPORT int rebinned_float64(const double* counts, double* out, int64_t n_rows, int64_t n_bins, const double* low,
                            const double* high, const double* new_low, const double* new_high, void*, int) {
    tq::rebinned(counts, out, n_rows, n_bins, low, high, new_low, new_high);
    return 0;
}
