// The steps of observing and quantizing, each in a file of its own; observed.cpp runs them one after the other.
#pragma once

#include "common.h"

namespace tq {

// How a range takes in the ends of one more tensor.
struct Average {
    double momentum;
    bool starts_at_first;  // the first tensor counts alone
    bool joins;            // the range never shrinks
    bool copies;           // a full rate copies the ends, which keeps the sign of zero, as for rows of numbers
};

constexpr int NOT_FINITE = 3;

// Take the ends of a tensor, clamped, into the range of each channel and its weight. Returns NOT_FINITE, and changes
// nothing, if an end is not finite.
template <typename T>
int track(const T* x, T* low, T* high, T* weight, Walk walk, double least, double most, Average average, void* parallel,
          int threads);

// The steps of n ranges; and their zero points, unless these are nullptr, for codes from qmin to qmax.
template <typename T>
void affine(const T* least, const T* most, T* step, T* zero_point, int64_t n, T n_steps, T qmin, T qmax);

// What x is clamped to, NaN for an end that is open, and whether the mask is 0 at its ends and beyond them.
struct Clamp {
    double low, high;
    bool is_strict;

    // Narrow the bounds of codes, counted from real 0, to those of clamped numbers: rounding is monotone.
    template <typename T>
    void narrow(T step, T* least, T* most) const {
        if (!std::isnan(low)) *least = greater(*least, low == 0.0 ? T(0) : std::rint(T(low) / step));
        if (!std::isnan(high)) *most = greater(lesser(*most, std::rint(T(high) / step)), *least);
    }
};

constexpr int ALL_ONES = 2;

// The values on a grid, and a mask unless `bits` is nullptr. Returns ALL_ONES where the mask is 1 everywhere.
template <typename T>
int uniform(const T* x, T* out, uint8_t* bits, Walk walk, Number<T> step, Number<T> low, Number<T> high,
            Number<T> zero_point, Clamp clamp, int inside, void* parallel, int threads);

}  // namespace tq
