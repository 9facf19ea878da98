// Sums over rows of what each element becomes, in the order in which PyTorch adds up a row.
//
// A row is cut into blocks of SUMMED elements, which are added as float; what is left of it is added as double.
#include "common.h"

namespace tq {

constexpr int64_t SUMMED = 256;

// The order of PyTorch's own sum over numbers that are next to each other: in vectors of 32 bytes, four at a time, and
// so many rows of these at once that a sum over all of them is a tree of four levels.
template <typename T>
static T sum_as_torch(const T* __restrict numbers, int64_t n) {
    constexpr int64_t WIDTH = 32 / sizeof(T), ROW = 4 * WIDTH, LEVELS = 4;
    const int64_t size = n / ROW;
    int64_t power = 0;
    while ((int64_t(1) << power) < size) ++power;
    power = power / LEVELS > 4 ? power / LEVELS : 4;
    const int64_t step = int64_t(1) << power;
    T lanes[LEVELS][ROW] = {}, total = T(0);
    int64_t i = 0;
    while (i + step <= size) {
        for (const int64_t end = i + step; i < end; ++i)
            for (int64_t k = 0; k < ROW; ++k) lanes[0][k] += numbers[i * ROW + k];
        for (int64_t level = 1; level < LEVELS; ++level) {
            for (int64_t k = 0; k < ROW; ++k) {
                lanes[level][k] += lanes[level - 1][k];
                lanes[level - 1][k] = T(0);
            }
            if ((i & ((step - 1) << (level * power))) != 0) break;
        }
    }
    for (; i < size; ++i)
        for (int64_t k = 0; k < ROW; ++k) lanes[0][k] += numbers[i * ROW + k];
    for (int64_t level = 1; level < LEVELS; ++level)
        for (int64_t k = 0; k < ROW; ++k) lanes[0][k] += lanes[level][k];
    T* all = lanes[0];
    for (i = size * ROW; i + WIDTH <= n; i += WIDTH)
        for (int64_t k = 0; k < WIDTH; ++k) all[k] += numbers[i + k];
    for (int64_t k = 0; k < WIDTH; ++k) all[k] = ((all[k] + all[WIDTH + k]) + all[2 * WIDTH + k]) + all[3 * WIDTH + k];
    for (; i < n; ++i) total += numbers[i];
    for (int64_t k = 0; k < WIDTH; ++k) total += all[k];
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
static double sum_block(const Function& function, const float* __restrict x, int64_t n, float threshold, bool is_whole) {
    if (is_whole) {
        float values[SUMMED];
        for (int64_t i = 0; i < SUMMED; ++i) values[i] = function(x[i], threshold);
        return double(sum_as_torch(values, SUMMED));
    }
    double values[SUMMED];
    for (int64_t i = 0; i < n; ++i) values[i] = double(function(x[i], threshold));
    return sum_as_torch(values, n);
}

// Room for the sums of all blocks of all rows, and of what is left of each row.
struct Room {
    int64_t rows, blocks;
    double* sums;

    Room(int64_t rows, int64_t n) : rows(rows), blocks(n / SUMMED) {
        sums = static_cast<double*>(std::malloc(rows * (blocks + 1) * sizeof(double)));
    }
    ~Room() { std::free(sums); }
    Room(const Room&) = delete;

    double& at(int64_t row, int64_t block) { return sums[row * (blocks + 1) + block]; }
    double total(int64_t row) { return sum_as_torch(&at(row, 0), blocks) + at(row, blocks); }
};

// The sum of each row, and the smallest and largest of the magnitudes that are the largest finite ones of their rows.
template <typename Function>
static int sums(const Function& function, const float* x, double* totals, double* range, int64_t rows, int64_t n,
                void* parallel, int threads) {
    Room room(rows, n), largest(rows, n);
    if (room.sums == nullptr || largest.sums == nullptr) return 1;
    in_blocks(x, rows, n, parallel, threads, [&](int64_t row, int64_t block, const float* own, int64_t n_own) {
        largest.at(row, block) = largest_bits(own, n_own);
        room.at(row, block) = sum_block(function, own, n_own, 0.0f, block < room.blocks);
    });
    range[0] = INFINITY;
    range[1] = 0.0;
    for (int64_t row = 0; row < rows; ++row) {
        totals[row] = room.total(row);
        double most = 0.0;
        for (int64_t block = 0; block <= room.blocks; ++block) most = std::fmax(most, largest.at(row, block));
        if (most == 0.0 || most >= double(0x7F800000)) continue;
        const int32_t bits = int32_t(most);
        float absmax;
        std::memcpy(&absmax, &bits, sizeof absmax);
        range[0] = std::fmin(range[0], double(absmax));
        range[1] = std::fmax(range[1], double(absmax));
    }
    return 0;
}

}  // namespace tq

#define ROW_SUMS(NAME, FUNCTION)                                                                                       \
    EXPORT int NAME(const float* x, double* totals, double* range, int64_t rows, int64_t n, void* parallel,            \
                    int threads) {                                                                                     \
        return tq::sums(FUNCTION{}, x, totals, range, rows, n, parallel, threads);                                     \
    }
ROW_SUMS(magnitude_sums_float32, tq::Magnitude)
ROW_SUMS(square_sums_float32, tq::Square)

EXPORT int sums_above_float32(const float* x, const double* thresholds, double* totals, double* counts, int64_t rows,
                              int64_t n, void* parallel, int threads) {
    using namespace tq;
    Room room(rows, n), count(rows, n);
    if (room.sums == nullptr || count.sums == nullptr) return 1;
    in_blocks(x, rows, n, parallel, threads, [&](int64_t row, int64_t block, const float* own, int64_t n_own) {
        const float threshold = float(thresholds[row]);
        const bool is_whole = block < room.blocks;
        room.at(row, block) = sum_block(Above{}, own, n_own, threshold, is_whole);
        count.at(row, block) = sum_block(Count{}, own, n_own, threshold, is_whole);
    });
    for (int64_t row = 0; row < rows; ++row) {
        totals[row] = room.total(row);
        counts[row] = count.total(row);
    }
    return 0;
}
