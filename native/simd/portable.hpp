// The vectors of simd/vector.hpp in plain C++, which compilers vectorise for any processor.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "simd/halves.hpp"

namespace LAMP_ISA {

struct vf {
  static constexpr int width = 8;
  float v[width];
};
struct vmask {
  bool v[vf::width];
};

template <class F>
inline vf lanes(F f) {
  vf r;
  for (int i = 0; i < vf::width; ++i) r.v[i] = f(i);
  return r;
}
template <class F>
inline vmask flags(F f) {
  vmask r;
  for (int i = 0; i < vf::width; ++i) r.v[i] = f(i);
  return r;
}
inline std::uint32_t as_bits(float x) { return std::bit_cast<std::uint32_t>(x); }
inline float as_float(std::uint32_t x) { return std::bit_cast<float>(x); }

inline vf set1(float x) { return lanes([&](int) { return x; }); }
inline vf load(const float* p) { return lanes([&](int i) { return p[i]; }); }
inline void store(float* p, vf x) {
  for (int i = 0; i < vf::width; ++i) p[i] = x.v[i];
}
inline vf fma(vf a, vf b, vf c) { return lanes([&](int i) { return std::fma(a.v[i], b.v[i], c.v[i]); }); }
inline vf fnma(vf a, vf b, vf c) { return lanes([&](int i) { return std::fma(-a.v[i], b.v[i], c.v[i]); }); }
inline vf operator+(vf a, vf b) { return lanes([&](int i) { return a.v[i] + b.v[i]; }); }
inline vf operator-(vf a, vf b) { return lanes([&](int i) { return a.v[i] - b.v[i]; }); }
inline vf operator*(vf a, vf b) { return lanes([&](int i) { return a.v[i] * b.v[i]; }); }
inline vf operator/(vf a, vf b) { return lanes([&](int i) { return a.v[i] / b.v[i]; }); }
inline vf max(vf a, vf b) { return lanes([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; }); }
inline vf min(vf a, vf b) { return lanes([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; }); }
inline vf bit_and(vf a, vf b) { return lanes([&](int i) { return as_float(as_bits(a.v[i]) & as_bits(b.v[i])); }); }
inline vf bit_or(vf a, vf b) { return lanes([&](int i) { return as_float(as_bits(a.v[i]) | as_bits(b.v[i])); }); }
inline vmask gt(vf a, vf b) { return flags([&](int i) { return a.v[i] > b.v[i]; }); }
inline vmask le(vf a, vf b) { return flags([&](int i) { return a.v[i] <= b.v[i]; }); }
inline vf select(vmask m, vf yes, vf no) { return lanes([&](int i) { return m.v[i] ? yes.v[i] : no.v[i]; }); }
inline unsigned bits(vmask m) {
  unsigned r = 0;
  for (int i = 0; i < vf::width; ++i) r |= static_cast<unsigned>(m.v[i]) << i;
  return r;
}
inline vmask mask_bytes(const std::uint8_t* p) { return flags([&](int i) { return p[i] != 0; }); }
inline vmask mask_and(vmask a, vmask b) { return flags([&](int i) { return a.v[i] && b.v[i]; }); }
inline vf exp2_integer(vf n) {
  return lanes([&](int i) { return as_float(static_cast<std::uint32_t>(static_cast<int>(n.v[i]) + 127) << 23); });
}
inline vf round_integer(vf x) { return lanes([&](int i) { return std::nearbyint(x.v[i]); }); }
inline vf sqrt(vf x) { return lanes([&](int i) { return std::sqrt(x.v[i]); }); }

// As in simd/avx512.hpp.
struct vi {
  std::int32_t v[vf::width];
};
struct vhalves {
  double v[vf::width];
};
template <class R, class F>
inline R each(F f) {
  R r;
  for (int i = 0; i < vf::width; ++i) r.v[i] = f(i);
  return r;
}
inline vi integers_zero() { return {}; }
inline vi add(vi a, vi b) { return each<vi>([&](int i) { return a.v[i] + b.v[i]; }); }
inline vi truncate(vf x) { return each<vi>([&](int i) { return static_cast<std::int32_t>(x.v[i]); }); }
inline vf to_float(vi x) { return lanes([&](int i) { return static_cast<float>(x.v[i]); }); }
inline vf power_quotient(vf e, int bits) {
  const auto top = static_cast<std::uint32_t>(254 + bits) << 23;
  return lanes([&](int i) { return as_float(top - as_bits(e.v[i])); });
}
inline vhalves halves(vi x) { return each<vhalves>([&](int i) { return static_cast<double>(x.v[i]); }); }
inline vhalves add(const vhalves& a, const vhalves& b) { return each<vhalves>([&](int i) { return a.v[i] + b.v[i]; }); }
inline vhalves multiply(const vhalves& a, const vhalves& b) {
  return each<vhalves>([&](int i) { return a.v[i] * b.v[i]; });
}
inline vhalves truncate(const vhalves& x) { return each<vhalves>([&](int i) { return std::trunc(x.v[i]); }); }
inline vhalves halves(vf x) { return each<vhalves>([&](int i) { return static_cast<double>(x.v[i]); }); }
inline vf toward_zero(const vhalves& x, int bits) {
  const std::uint64_t kept = ~0ull << (52 - bits);
  return lanes([&](int i) {
    return static_cast<float>(std::bit_cast<double>(std::bit_cast<std::uint64_t>(x.v[i]) & kept));
  });
}

// One number for each of the sixteen rows of a block.
struct vrows {
  vf v[2];
};

// Pairs of 16-bit integers, one pair for each row of a block, and a 32-bit sum for each row.
struct vpairs {
  std::int16_t v[32];
};
struct vsums {
  std::int32_t v[16];
};
inline vsums sums_zero() { return {}; }
// Thirty-two signed bytes; as many halves of bytes, 0 ... 15 or those less 8, the first of each pair the low half.
inline vpairs signed_bytes(const std::uint8_t* p) {
  vpairs r;
  for (int i = 0; i < 32; ++i) r.v[i] = static_cast<std::int8_t>(p[i]);
  return r;
}
inline vpairs nibbles(const std::uint8_t* p) {
  vpairs r;
  for (int i = 0; i < 16; ++i) {
    r.v[2 * i] = p[i] & 15;
    r.v[2 * i + 1] = p[i] >> 4;
  }
  return r;
}
inline vpairs nibbles_less_8(const std::uint8_t* p) {
  vpairs r = nibbles(p);
  for (auto& x : r.v) x = static_cast<std::int16_t>(x - 8);
  return r;
}
// 16 high + low, 0 <= low < 16.
inline vpairs join(const vpairs& high, vpairs low) {
  for (int i = 0; i < 32; ++i) low.v[i] = static_cast<std::int16_t>(high.v[i] * 16 + low.v[i]);
  return low;
}
inline vsums multiply_add(const vpairs& a, std::int32_t pair, vsums c) {
  const std::int32_t first = static_cast<std::int16_t>(pair & 0xffff), second = pair >> 16;
  for (int i = 0; i < 16; ++i) c.v[i] += a.v[2 * i] * first + a.v[2 * i + 1] * second;
  return c;
}
inline vpairs load_pairs(const std::int16_t* p) {
  vpairs r;
  std::memcpy(r.v, p, sizeof r.v);
  return r;
}
inline void store_pairs(std::int16_t* p, const vpairs& x) { std::memcpy(p, x.v, sizeof x.v); }
inline vrows to_rows(const vsums& x) {
  vrows r;
  for (int i = 0; i < 2; ++i)
    r.v[i] = lanes([&](int lane) { return static_cast<float>(x.v[i * vf::width + lane]); });
  return r;
}
inline vf widen_bf16(const std::uint16_t* p) {
  return lanes([&](int i) { return from_bf16(p[i]); });
}
inline vrows load_scales(const std::uint16_t* p) {
  vrows r;
  for (int i = 0; i < 2; ++i) r.v[i] = widen_bf16(p + i * vf::width);
  return r;
}
inline void store_shorts(std::int16_t* p, const vrows& x) {
  for (int i = 0; i < 16; ++i) {
    const float n = std::nearbyint(x.v[i / vf::width].v[i % vf::width]);
    p[i] = static_cast<std::int16_t>(std::fabs(n) <= 32767.0f ? n : 0.0f);
  }
}
inline vf widen(const std::uint16_t* p) {
  return lanes([&](int i) { return from_f16(p[i]); });
}

// Sum of the lanes, halves first, as the other instruction sets add them. The largest lane, none of them NaN.
inline float sum_halves(vf x) {
  for (int half = vf::width / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) x.v[i] += x.v[i + half];
  return x.v[0];
}
inline float largest_halves(vf x) {
  float r = x.v[0];
  for (int i = 1; i < vf::width; ++i) r = r > x.v[i] ? r : x.v[i];
  return r;
}

#define LAMP_OWN_FUNCTION
inline void pin(vsums&) {}

}  // namespace LAMP_ISA
