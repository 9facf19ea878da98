// The steps and zero points of affine grids over ranges: a dozen operations on small tensors in one call.
#include <limits>

#include "steps.h"

namespace tq {

constexpr double LARGEST_STEP = 3.3895313892515355e38;  // the largest bfloat16

// NaN stays NaN, as in torch.clamp.
template <typename T>
static inline T clamp(T x, T low, T high) {
    x = x < low ? low : x;
    return x > high ? high : x;
}

template <typename T>
void affine(const T* least, const T* most, T* step, T* zero_point, int64_t n, T n_steps, T qmin, T qmax) {
    const T limit = std::numeric_limits<T>::max() / 2;
    const T largest = sizeof(T) == 4 ? T(LARGEST_STEP) : std::numeric_limits<T>::max();
    for (int64_t i = 0; i < n; ++i) {
        T low = clamp(least[i], -limit, T(0)), high = clamp(most[i], T(0), limit);
        T span = zero_point != nullptr ? high - low : (-low > high || std::isnan(low) ? -low : high);
        step[i] = span > 0 ? clamp(span / n_steps, T(0x1p-126), largest) : T(1);
        if (zero_point != nullptr) zero_point[i] = clamp(qmin + std::rint(-low / step[i]), qmin, qmax);
    }
}

template void affine(const float*, const float*, float*, float*, int64_t, float, float, float);
template void affine(const double*, const double*, double*, double*, int64_t, double, double, double);

}  // namespace tq

#define AFFINE(NAME, T)                                                                                               \
    EXPORT int NAME(const T* least, const T* most, T* step, T* zero_point, int64_t n, double n_steps, double qmin,    \
                    double qmax, void*, int) {                                                                        \
        tq::affine<T>(least, most, step, zero_point, n, T(n_steps), T(qmin), T(qmax));                                \
        return 0;                                                                                                     \
    }
AFFINE(affine_float32, float)
AFFINE(affine_float64, double)
