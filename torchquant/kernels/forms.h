// Formats of a few fixed numbers times a scale: signs, ternary, powers of two, mini-floats, mid-rise and uniform grids.
//
// `value` returns the projection of v, and `is_inside` whether it is not clipped; both get three numbers of a channel.
#pragma once

#include "common.h"

namespace tq {

static inline float clamped(float v, float low, float high) {  // as torch.clamp: NaN stays NaN, a zero keeps its sign
    v = v < low ? low : v;
    return v > high ? high : v;
}

static inline uint32_t bits_of(float v) {
    uint32_t bits;
    std::memcpy(&bits, &v, sizeof bits);
    return bits;
}

static inline float of_bits(uint32_t bits) {
    float v;
    std::memcpy(&v, &bits, sizeof v);
    return v;
}

// The largest power of two not above |v|, 0 for subnormal v, infinity for NaN.
static inline float floor_pow2(float v) { return of_bits(bits_of(v) & 0x7F800000u); }

// 1 / v for a power of two from 2**-126 to 2**126.
static inline float reciprocal(float v) { return of_bits((254u << 23) - bits_of(v)); }

struct Signs {
    float value(float v, float scale, float, float) const {
        return ((clamped(v, 0.0f, 0.0f) + float(v >= 0.0f)) * 2.0f - 1.0f) * scale;
    }
    bool is_inside(float v, float scale, float, float) const { return std::fabs(v) <= 1.5f * scale; }
};

struct Ternary {
    float value(float v, float scale, float threshold, float) const {
        const float sign = float(v > 0.0f) - float(v < 0.0f), zero_or_nan = clamped(v, 0.0f, 1.0f) * 0.0f;
        return (float(std::fabs(v) > threshold) * sign + zero_or_nan) * scale;
    }
    bool is_inside(float v, float scale, float, float) const { return std::fabs(v) <= 1.5f * scale; }
};

struct PowersOfTwo {
    float largest;

    float value(float v, float scale, float, float) const {
        const float scaled = std::fabs(v) / (scale > 0.0f ? scale : 1.0f);
        const float magnitude = clamped(floor_pow2(scaled / 1.5f) * 2.0f, 1.0f, largest);
        return (magnitude + clamped(scaled, 0.0f, 1.0f) * 0.0f) * (v >= 0.0f ? 1.0f : -1.0f) * scale;
    }
    bool is_inside(float v, float scale, float, float) const { return std::fabs(v) <= scale * largest; }
};

template <bool SHIFTS>
struct Floats {
    float smallest_normal, largest_power, fraction, largest;  // fraction: 2**-mantissa_bits

    float centred(float v, float shift) const { return SHIFTS ? v - shift : v; }
    float value(float v, float scale, float shift, float) const {
        const float scaled = centred(v, shift) / scale;
        const float spacing = clamped(floor_pow2(scaled), smallest_normal, largest_power) * fraction;
        const float nearest = std::rint(scaled * reciprocal(spacing)) * spacing;
        const float value = clamped(nearest, -largest, largest) * scale;
        return SHIFTS ? value + shift : value;
    }
    bool is_inside(float v, float scale, float shift, float) const {
        return std::fabs(centred(v, shift)) <= scale * largest;
    }
};

template <bool SHIFTS>
struct Midrise {  // the middles of equal cells
    float low, high;

    float centred(float v, float shift) const { return SHIFTS ? v - shift : v; }
    float value(float v, float scale, float cell, float shift) const {
        const float code = std::floor(centred(v, shift) / (cell > 0.0f ? cell : 1.0f));
        const float value = (clamped(code, low, high) + 0.5f) * scale;
        return SHIFTS ? value + shift : value;
    }
    bool is_inside(float v, float, float cell, float shift) const {
        return std::fabs(centred(v, shift)) <= cell * (high + 1.0f);
    }
};

struct Steps {  // a uniform grid, its codes counted from real 0
    float value(float v, float step, float low, float high) const {
        return clamped(std::rint(v / step), low, high) * step;
    }
    bool is_inside(float v, float step, float low, float high) const {
        const float code = std::rint(v / step);
        return code == clamped(code, low, high);
    }
};

}  // namespace tq
