// The activations of gated MLPs and of convolutions.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace headwise {
namespace HEADWISE_ISA {

// The error function: a quotient of two polynomials, right to a few units of the last place.
HEADWISE_INLINE vf erf(vf x) {
  const vf most = splat(4.0f);
  x = select((vi)(x > most), most, select((vi)(x < -most), -most, x));
  const vf z = x * x;
  vf p = splat(-2.72614225801306e-10f);
  p = p * z + 2.77068142495902e-08f;
  p = p * z - 2.10102402082508e-06f;
  p = p * z - 5.69250639462346e-05f;
  p = p * z - 7.34990630326855e-04f;
  p = p * z - 2.95459980854025e-03f;
  p = p * z - 1.60960333262415e-02f;
  vf q = splat(-1.45660718464996e-05f);
  q = q * z - 2.13374055278905e-04f;
  q = q * z - 1.68282697438203e-03f;
  q = q * z - 7.37332916720468e-03f;
  q = q * z - 1.42647390514189e-02f;
  return x * p / q;
}

HEADWISE_INLINE vf activate(Activation activation, vf x) {
  const vf zero = vf{};
  switch (activation) {
    case kSilu: {
      // e^-x of a number below -88 is beyond floats, and the quotient 0
      const vf far = select((vi)(x < -88.0f), splat(-88.0f), x);
      return x / (1.0f + exp(-far));
    }
    case kGelu:
      return 0.5f * x * (1.0f + erf(x * 0.70710678118654752f));
    case kGeluTanh:
      return 0.5f * x * (1.0f + tanh(0.79788456080286536f * (x + 0.044715f * x * x * x)));
    case kRelu:
      return select((vi)(x < zero), zero, x);
    default: {
      const vf positive = select((vi)(x < zero), zero, x);
      return positive * positive;
    }
  }
}

}  // namespace HEADWISE_ISA
}  // namespace headwise
