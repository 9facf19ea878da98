// Sums over rows of what each element becomes, in the order in which PyTorch adds up a row.
//
// A row is cut into blocks of SUMMED elements, which are added as float; what is left of it is added as double.
#include "common.h"

namespace tq {

constexpr int64_t SUMMED = 256;

// The order of PyTorch's own sum over few numbers that are next to each other, in vectors of 32 bytes.
template <typename T>
static T sum_as_torch(const T* __restrict numbers, int64_t n) {
    constexpr int64_t WIDTH = 32 / sizeof(T), ROW = 4 * WIDTH;
    T lanes[ROW] = {}, total = T(0);
    int64_t i = 0;
    for (; i + ROW <= n; i += ROW)
        for (int64_t k = 0; k < ROW; ++k) lanes[k] += numbers[i + k];
    for (; i + WIDTH <= n; i += WIDTH)
        for (int64_t k = 0; k < WIDTH; ++k) lanes[k] += numbers[i + k];
    for (int64_t k = 0; k < WIDTH; ++k)
        lanes[k] = ((lanes[k] + lanes[WIDTH + k]) + lanes[2 * WIDTH + k]) + lanes[3 * WIDTH + k];
    for (; i < n; ++i) total += numbers[i];
    for (int64_t k = 0; k < WIDTH; ++k) total += lanes[k];
    return total;
}

struct Magnitude {
    float operator()(float v, float) const { return std::fabs(v); }
};

struct Square {
    float operator()(float v, float) const { return v * v; }
};

struct Above {  // the magnitude where it is above the threshold of its row
    float operator()(float v, float threshold) const { return std::fabs(v) * float(std::fabs(v) > threshold); }
};

struct Count {
    float operator()(float v, float threshold) const { return float(std::fabs(v) > threshold); }
};

static int32_t largest_bits(const float* __restrict x, int64_t n) {  // of the magnitudes; that of NaN is the largest
    int32_t largest = 0;
    for (int64_t i = 0; i < n; ++i) {
        int32_t bits;
        std::memcpy(&bits, x + i, sizeof bits);
        bits &= 0x7FFFFFFF;
        largest = bits > largest ? bits : largest;
    }
    return largest;
}

// Call `work(row, block, elements, n)` for each block of each row and for what is left of it.
template <typename Work>
static void in_blocks(const float* x, int64_t rows, int64_t n, void* parallel, int threads, const Work& work) {
    const int64_t blocks = n / SUMMED, each = blocks + 1;
    in_chunks(rows * each * SUMMED, parallel, threads, [&](int64_t first, int64_t last) {
        for (int64_t unit = first / SUMMED; unit < last / SUMMED; ++unit) {
            const int64_t row = unit / each, block = unit % each;
            work(row, block, x + row * n + block * SUMMED, block < blocks ? SUMMED : n % SUMMED);
        }
    });
}

template <typename Function>
static void sum_block(const Function& function, const float* __restrict x, int64_t n, float threshold, bool is_whole,
                      float* sum, double* rest) {
    if (is_whole) {
        float values[SUMMED];
        for (int64_t i = 0; i < SUMMED; ++i) values[i] = function(x[i], threshold);
        *sum = sum_as_torch(values, SUMMED);
    } else {
        double values[SUMMED];
        for (int64_t i = 0; i < n; ++i) values[i] = double(function(x[i], threshold));
        *rest = sum_as_torch(values, n);
    }
}

// Whether the sums of all rows are free of overflow and underflow, and the sums: (rows, blocks) and (rows).
template <typename Function>
static int sums(const Function& function, const float* x, float* of_blocks, double* rests, double* range, int64_t rows,
                int64_t n, void* parallel, int threads) {
    const int64_t blocks = n / SUMMED;
    int32_t* largest = static_cast<int32_t*>(std::malloc(rows * (blocks + 1) * sizeof(int32_t)));
    if (largest == nullptr) return 1;
    in_blocks(x, rows, n, parallel, threads, [&](int64_t row, int64_t block, const float* own, int64_t n_own) {
        largest[row * (blocks + 1) + block] = largest_bits(own, n_own);
        sum_block(function, own, n_own, 0.0f, block < blocks, of_blocks + row * blocks + block, rests + row);
    });
    range[0] = INFINITY;
    range[1] = 0.0;
    for (int64_t row = 0; row < rows; ++row) {
        int32_t bits = 0;
        for (int64_t block = 0; block <= blocks; ++block) {
            const int32_t own = largest[row * (blocks + 1) + block];
            bits = own > bits ? own : bits;
        }
        if (bits == 0 || bits >= 0x7F800000) continue;
        float absmax;
        std::memcpy(&absmax, &bits, sizeof absmax);
        range[0] = absmax < range[0] ? absmax : range[0];
        range[1] = absmax > range[1] ? absmax : range[1];
    }
    std::free(largest);
    return 0;
}

}  // namespace tq

#define ROW_SUMS(NAME, FUNCTION)                                                                                       \
    EXPORT int NAME(const float* x, float* of_blocks, double* rests, double* range, int64_t rows, int64_t n,           \
                    void* parallel, int threads) {                                                                     \
        return tq::sums(FUNCTION{}, x, of_blocks, rests, range, rows, n, parallel, threads);                           \
    }
ROW_SUMS(magnitude_sums_float32, tq::Magnitude)
ROW_SUMS(square_sums_float32, tq::Square)

EXPORT int sums_above_float32(const float* x, const float* thresholds, float* of_blocks, double* rests,
                              float* counts_of_blocks, double* counts_of_rests, int64_t rows, int64_t n,
                              void* parallel, int threads) {
    using namespace tq;
    const int64_t blocks = n / SUMMED;
    in_blocks(x, rows, n, parallel, threads, [&](int64_t row, int64_t block, const float* own, int64_t n_own) {
        const int64_t place = row * blocks + block;
        const bool is_whole = block < blocks;
        sum_block(Above{}, own, n_own, thresholds[row], is_whole, of_blocks + place, rests + row);
        sum_block(Count{}, own, n_own, thresholds[row], is_whole, counts_of_blocks + place, counts_of_rests + row);
    });
    return 0;
}
