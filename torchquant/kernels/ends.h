// The smallest and the largest number of many.
#pragma once

#include "common.h"

namespace tq {

// Move the ends of one channel apart to include n elements, in lanes that a compiler makes vectors of.
template <typename T>
static void widen(const T* x, int64_t n, T* low, T* high) {
    constexpr int64_t LANES = 32;
    int64_t i = 0;
    if (n >= 2 * LANES) {
        T lows[LANES], highs[LANES];
        Flag<T> nan[LANES];
        for (int64_t k = 0; k < LANES; ++k) lows[k] = *low, highs[k] = *high, nan[k] = 0;
        for (; i + LANES <= n; i += LANES) {
            for (int64_t k = 0; k < LANES; ++k) {
                const T one = x[i + k];
                lows[k] = one < lows[k] ? one : lows[k];
                highs[k] = one > highs[k] ? one : highs[k];
                nan[k] |= -Flag<T>(one != one);
            }
        }
        for (int64_t half = LANES / 2; half > 0; half /= 2) {
            for (int64_t k = 0; k < half; ++k) {
                lows[k] = lows[k + half] < lows[k] ? lows[k + half] : lows[k];
                highs[k] = highs[k + half] > highs[k] ? highs[k + half] : highs[k];
                nan[k] |= nan[k + half];
            }
        }
        *low = nan[0] || *low != *low ? T(NAN) : lows[0];
        *high = nan[0] || *high != *high ? T(NAN) : highs[0];
    }
    for (; i < n; ++i) *low = lesser(*low, x[i]), *high = greater(*high, x[i]);
}

}  // namespace tq
