// The weight of the rule `running` where a softmax follows: decoding's scores, and the LM head.
#pragma once

#include "lowbit/linear.hpp"

namespace LAMP_ISA {

// Errors beyond a nat aren't small: z then counts as what it might be four standard errors higher.
constexpr float kFar = 1.0f, kDeviations = 4.0f, kLeastProbability = 0x1p-126f, kLargestExponent = 87.0f;

// 2 z (1 - z) s r, the l1 change of the probabilities that a score's error r makes, with s the slope of the softcap.
// That is linear in r, and says nothing once r exceeds a nat: there z counts as what it might be four standard errors
// higher, and 1 - z as 1.
inline vf look_ahead(vf z, vf r, const float* slope) {
  vf w = (set1(1.0f) - z) * z * set1(2.0f) * r;
  if (slope) w = w * load(slope);
  const vmask far = gt(r, set1(kFar));
  if (!bits(far)) return w;
  const vf up = exp(min(r * set1(kDeviations), set1(kLargestExponent)));
  const vf high = min(set1(1.0f), max(z, set1(kLeastProbability)) * up);
  return select(far, high * set1(2.0f) * r, w);
}

// The same for one entry, without a softcap.
inline float look_ahead(float z, float r) {
  if (!(r > kFar)) return 2.0f * z * (1.0f - z) * r;
  const float up = exp_one(std::min(kDeviations * r, kLargestExponent));
  return 2.0f * std::min(1.0f, std::max(z, kLeastProbability) * up) * r;
}

// By how much a logarithm of z that the weight of an error of at most r carries beyond T may lie below log(T / (2 r)).
inline float look_ahead_reach(float r) {
  if (!(r > kFar)) return 0.0f;
  // Where e^(4 r) reaches the least probability no z is too small.
  return kDeviations * r < 80.0f ? kDeviations * r : std::numeric_limits<float>::infinity();
}

}  // namespace LAMP_ISA
