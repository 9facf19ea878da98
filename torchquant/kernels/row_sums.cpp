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

// What each element of a row becomes: `of(row)` returns the function of its elements.
struct Itself {
    auto of(int64_t) const { return [](float v) { return v; }; }
};

struct Magnitude {
    auto of(int64_t) const { return [](float v) { return std::fabs(v); }; }
};

struct Square {
    auto of(int64_t) const { return [](float v) { return v * v; }; }
};

struct Above {  // the magnitude where it is above the threshold of its row
    const double* thresholds;
    auto of(int64_t row) const {
        return [t = float(thresholds[row])](float v) { return std::fabs(v) * float(std::fabs(v) > t); };
    }
};

struct Count {
    const double* thresholds;
    auto of(int64_t row) const {
        return [t = float(thresholds[row])](float v) { return float(std::fabs(v) > t); };
    }
};

struct CentredSquare {
    const double* centres;
    auto of(int64_t row) const {
        return [centre = centres[row]](float v) { return (double(v) - centre) * (double(v) - centre); };
    }
};

struct Wide {
    auto of(int64_t) const { return [](float v) { return double(v); }; }
};

struct Nonzero {
    auto of(int64_t) const { return [](float v) { return float(v != 0.0f); }; }
};

struct Positive {
    auto of(int64_t) const { return [](float v) { return float(v > 0.0f); }; }
};

struct CentredMagnitude {
    const double* centres;
    auto of(int64_t row) const { return [centre = centres[row]](float v) { return std::fabs(double(v) - centre); }; }
};

struct SquaredCut {  // the square of what a clamp takes away
    const double *lows, *highs;
    auto of(int64_t row) const {
        return [low = lows[row], high = highs[row]](float v) {
            const double cut = double(v) - lesser(greater(double(v), low), high);
            return cut * cut;
        };
    }
};

struct Cells {  // of equal width around 0; a point is the middle of one, in widths
    const float* widths;
    float low, high;
    float point(float v, float width) const {
        float code = std::floor(v / width);
        code = code < low ? low : code;
        return (code > high ? high : code) + 0.5f;
    }
    float width(int64_t row) const { return widths[row] > 0.0f ? widths[row] : 1.0f; }
};

struct TimesPoint : Cells {
    auto of(int64_t row) const {
        return [*this, width = width(row)](float v) { return v * point(v, width); };
    }
};

struct SquaredPoint : Cells {
    auto of(int64_t row) const {
        return [*this, width = width(row)](float v) { return point(v, width) * point(v, width); };
    }
};

// The magnitude of what N signs times scales leave of an element: each sign is that of what those before it leave.
template <int N>
struct Left {
    const float* scales;  // N of each row
    auto of(int64_t row) const {
        const float* own = scales + row * N;
        return [own](float v) {
            float total = 0.0f;
            for (int k = 0; k < N; ++k) total += v - total >= 0.0f ? own[k] : -own[k];
            return std::fabs(v - total);
        };
    }
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
static double sum_block(const Function& function, const float* __restrict x, int64_t n, bool is_whole) {
    if (is_whole) {
        decltype(function(0.0f)) values[SUMMED];
        for (int64_t i = 0; i < SUMMED; ++i) values[i] = function(x[i]);
        return double(sum_as_torch(values, SUMMED));
    }
    double values[SUMMED];
    for (int64_t i = 0; i < n; ++i) values[i] = double(function(x[i]));
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

// The sums of the functions over each row, those of the first function first; and, unless `range` is nullptr, the
// smallest and largest of the magnitudes that are the largest finite ones of their rows.
template <typename... Functions>
static int sums(const float* x, double* totals, double* range, int64_t rows, int64_t n, void* parallel, int threads,
                const Functions&... functions) {
    constexpr int64_t N = sizeof...(Functions);
    Room room(N * rows, n), largest(range == nullptr ? 0 : rows, n);
    if (room.sums == nullptr || largest.sums == nullptr) return 1;
    in_blocks(x, rows, n, parallel, threads, [&](int64_t row, int64_t block, const float* own, int64_t n_own) {
        int64_t k = 0;
        if (range != nullptr) largest.at(row, block) = largest_bits(own, n_own);
        ((room.at(k++ * rows + row, block) = sum_block(functions.of(row), own, n_own, block < room.blocks)), ...);
    });
    for (int64_t row = 0; row < N * rows; ++row) totals[row] = room.total(row);
    if (range == nullptr) return 0;
    range[0] = INFINITY;
    range[1] = 0.0;
    for (int64_t row = 0; row < rows; ++row) {
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

#define ROWS const float *x, double *totals, double *range, int64_t rows, int64_t n
#define SUMS(...) return tq::sums(x, totals, range, rows, n, parallel, threads, __VA_ARGS__)

EXPORT int plain_sums_float32(ROWS, void* parallel, int threads) { SUMS(tq::Itself{}); }

EXPORT int magnitude_sums_float32(ROWS, void* parallel, int threads) { SUMS(tq::Magnitude{}); }

EXPORT int square_sums_float32(ROWS, void* parallel, int threads) { SUMS(tq::Square{}); }

EXPORT int sums_above_float32(ROWS, const double* thresholds, void* parallel, int threads) {
    SUMS(tq::Above{thresholds}, tq::Count{thresholds});
}

EXPORT int centred_square_sums_float32(ROWS, const double* centres, void* parallel, int threads) {
    SUMS(tq::CentredSquare{centres});
}

EXPORT int wide_sums_float32(ROWS, void* parallel, int threads) { SUMS(tq::Wide{}, tq::Nonzero{}); }

EXPORT int distance_sums_float32(ROWS, const double* centres, void* parallel, int threads) {
    SUMS(tq::CentredSquare{centres}, tq::CentredMagnitude{centres}, tq::Positive{});
}

// The ends of three clamps: the low ends of all rows of the first, of the second, of the third, and the high ends alike.
EXPORT int cut_sums_float32(ROWS, const double* lows, const double* highs, void* parallel, int threads) {
    SUMS(tq::SquaredCut{lows, highs}, tq::SquaredCut{lows + rows, highs + rows},
         tq::SquaredCut{lows + 2 * rows, highs + 2 * rows});
}

EXPORT int cell_sums_float32(ROWS, const float* widths, double low, double high, void* parallel, int threads) {
    const tq::Cells cells{widths, float(low), float(high)};
    SUMS(tq::TimesPoint{cells}, tq::SquaredPoint{cells});
}

EXPORT int left_sums_float32(ROWS, const float* scales, int64_t n_scales, void* parallel, int threads) {
    switch (n_scales) {
        case 0: SUMS(tq::Left<0>{scales});
        case 1: SUMS(tq::Left<1>{scales});
        case 2: SUMS(tq::Left<2>{scales});
        case 3: SUMS(tq::Left<3>{scales});
        case 4: SUMS(tq::Left<4>{scales});
        case 5: SUMS(tq::Left<5>{scales});
        case 6: SUMS(tq::Left<6>{scales});
        default: SUMS(tq::Left<7>{scales});
    }
}
