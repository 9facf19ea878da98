// Observing and quantizing in one call: the ends of a tensor move a range, and the tensor is put on the grid over it.
#include "steps.h"

namespace tq {

// An affine grid: codes from qmin to qmax, and the zero point, NaN if it follows from the range.
struct Grid {
    double n_steps, qmin, qmax, zero_point;
};

template <typename T>
static int observed(const T* x, T* out, uint8_t* bits, T* low, T* high, T* weight, Walk walk, Average average,
                    Grid grid, Clamp clamp, int inside, void* parallel, int threads) {
    const double least = std::isnan(clamp.low) ? -INFINITY : clamp.low;
    const double most = std::isnan(clamp.high) ? INFINITY : clamp.high;
    const bool is_centred = !std::isnan(grid.zero_point);
    Rows<T> numbers(2, walk.channels);
    if (numbers.is_missing()) return 1;
    T *steps = numbers[0], *zero_points = is_centred ? nullptr : numbers[1];
    const int failed = track(x, low, high, weight, walk, least, most, average, parallel, threads);
    if (failed) return failed;
    affine(low, high, steps, zero_points, walk.channels, T(grid.n_steps), T(grid.qmin), T(grid.qmax));
    const auto plain = [](double number) { return Number<T>{nullptr, 1, number}; };
    const Number<T> zero_point{zero_points, walk.channels, grid.zero_point};
    return uniform(x, out, bits, walk, Number<T>{steps, walk.channels, 0.0}, plain(grid.qmin), plain(grid.qmax),
                   zero_point, clamp, inside, parallel, threads);
}

}  // namespace tq

#define OBSERVED(NAME, T)                                                                                             \
    EXPORT int NAME(const T* x, T* out, uint8_t* bits, T* low, T* high, T* weight, WALK, double momentum,             \
                    int starts_at_first, int joins, int copies, double n_steps, double qmin, double qmax,             \
                    double zero_point, double least, double most, int strict, int inside, void* parallel,             \
                    int threads) {                                                                                    \
        return tq::observed<T>(x, out, bits, low, high, weight, THE_WALK,                                             \
                               {momentum, starts_at_first != 0, joins != 0, copies != 0},                             \
                               {n_steps, qmin, qmax, zero_point}, {least, most, strict != 0}, inside, parallel,       \
                               threads);                                                                              \
    }
OBSERVED(observed_float32, float)
OBSERVED(observed_float64, double)
