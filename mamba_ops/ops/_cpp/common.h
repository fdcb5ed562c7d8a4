// What the C++ kernels share: how they are called, tensors of any float type, vectors, and functions of these.
//
// A vector holds 16 channels, or 16 numbers of one state, and what is left over is filled up. So a number is computed in
// the same way wherever it stands, and a row has the same bits in any company.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

constexpr int64_t LANES = 16;
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));

// ---- calls: one array of numbers, read in order ------------------------------------------------------------------------

struct Call {
  const int64_t* next;
  int64_t number() { return *next++; }
  bool flag() { return *next++ != 0; }
};

enum Type : int64_t { FLOAT32, FLOAT64, FLOAT16, BFLOAT16 };  // as in call.py

inline float to_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float load(const float& x) { return x; }
inline float load(const double& x) { return float(x); }

struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

inline float load(const BFloat& x) { return to_float(uint32_t(x.bits) << 16); }

inline float load(const Half& x) {
  uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
  if (rest < 0x400) return to_float(sign | bits_of(float(rest) * 0x1p-24f));  // subnormal
  return to_float(sign | (rest < 0x7c00 ? (rest << 13) + (112u << 23) : (rest << 13) | 0x7f800000u));
}

inline void store(float& to, float x) { to = x; }
inline void store(double& to, float x) { to = x; }

inline void store(BFloat& to, float x) {
  uint32_t bits = bits_of(x);
  to.bits = x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline void store(Half& to, float x) {
  uint32_t bits = bits_of(x), sign = (bits >> 16) & 0x8000, rest = bits & 0x7fffffff;
  if (x != x) {
    to.bits = 0x7e00;
  } else if (rest >= 0x477ff000) {  // rounds to more than the largest
    to.bits = uint16_t(sign | 0x7c00);
  } else if (rest < 0x38800000) {  // subnormal: adding 0.5 leaves units of 2^-24 in the low bits, rounded
    to.bits = uint16_t(sign | (bits_of(to_float(rest) + 0.5f) - bits_of(0.5f)));
  } else {
    to.bits = uint16_t(sign | ((rest - (112u << 23) + 0xfff + ((rest >> 13) & 1)) >> 13));
  }
}

struct Tensor {
  char* data;  // null where the argument is None
  int64_t type, strides[4];

  Tensor(Call& call, int rank) {
    data = reinterpret_cast<char*>(call.number());
    type = call.number();
    for (int i = 0; i < rank; i++) strides[i] = call.number();
  }

  explicit operator bool() const { return data != nullptr; }

  // The address of the element `offset`, if that is a float.
  float* floats(int64_t offset) const { return type == FLOAT32 ? reinterpret_cast<float*>(data) + offset : nullptr; }

  // Calls `function` with the address of the element `offset`, of its own type.
  template <class F>
  void at(int64_t offset, F function) const {
    switch (type) {
      case FLOAT32: return function(reinterpret_cast<float*>(data) + offset);
      case FLOAT64: return function(reinterpret_cast<double*>(data) + offset);
      case FLOAT16: return function(reinterpret_cast<Half*>(data) + offset);
      default: return function(reinterpret_cast<BFloat*>(data) + offset);
    }
  }

  void read(int64_t offset, int64_t stride, int64_t count, float* to) const {
    at(offset, [&](auto* from) {
      if (stride == 1)
        for (int64_t i = 0; i < count; i++) to[i] = load(from[i]);
      else
        for (int64_t i = 0; i < count; i++) to[i] = load(from[i * stride]);
    });
  }

  void write(int64_t offset, int64_t stride, int64_t count, const float* from) const {
    at(offset, [&](auto* to) {
      for (int64_t i = 0; i < count; i++) store(to[i * stride], from[i]);
    });
  }

  // Some tokens of some channels, as [tokens][LANES]; channels beyond the last are zero.
  void read_tile(int64_t offset, int64_t by_token, int64_t tokens, int64_t by_channel, int64_t channels, float* to) const {
    if (channels < LANES) std::memset(to, 0, 4 * LANES * tokens);
    at(offset, [&](auto* from) {
      if (by_token == 1)
        for (int64_t c = 0; c < channels; c++)
          for (int64_t t = 0; t < tokens; t++) to[t * LANES + c] = load(from[c * by_channel + t]);
      else
        for (int64_t t = 0; t < tokens; t++)
          for (int64_t c = 0; c < channels; c++) to[t * LANES + c] = load(from[t * by_token + c * by_channel]);
    });
  }
};

// Whole numbers of 4 or 8 bytes, or flags of 1.
struct Indices {
  const char* data;  // null where the argument is None
  int64_t bytes, rows, columns, by_row, by_column;

  explicit Indices(Call& call) {
    data = reinterpret_cast<const char*>(call.number());
    bytes = call.number(), rows = call.number(), columns = call.number();
    by_row = call.number(), by_column = call.number();
  }

  explicit operator bool() const { return data != nullptr; }

  int64_t at(int64_t row, int64_t column = 0) const {
    int64_t place = row * by_row + column * by_column;
    if (bytes == 1) return data[place] != 0;
    return bytes == 8 ? reinterpret_cast<const int64_t*>(data)[place] : reinterpret_cast<const int32_t*>(data)[place];
  }
};

// Which slots there are: `null` is none, and neither is one that the cache does not have.
struct Slots {
  Indices table;
  int64_t null, count;

  // The slot in a table, or -1.
  static int64_t known(int64_t slot, int64_t null, int64_t count) {
    return slot < 0 || slot == null || slot >= count ? -1 : slot;
  }

  int64_t at(int64_t row, int64_t column = 0) const {
    if (!table) return row;  // and then no row is null
    return column < table.columns ? known(table.at(row, column), null, count) : -1;
  }
};

// Where the tokens of rows are: packed, or as many for each row.
struct Rows {
  Indices bounds;
  int64_t tokens;

  int64_t begin(int64_t row) const { return bounds ? bound(row) : 0; }
  int64_t length(int64_t row) const { return bounds ? std::max<int64_t>(bound(row + 1) - bound(row), 0) : tokens; }
  // Of packed tokens row 0 is the only one that strides know.
  int64_t lead(int64_t row) const { return bounds ? 0 : row; }

 private:
  int64_t bound(int64_t row) const { return std::min(std::max<int64_t>(bounds.at(row), 0), tokens); }
};

// ---- vectors -------------------------------------------------------------------------------------------------------------

inline Floats all(float x) { return x - Floats{}; }

inline Floats some(const float* from, int64_t count = LANES) {
  Floats to{};
  std::memcpy(&to, from, 4 * count);
  return to;
}

inline void put(Floats x, float* to, int64_t count = LANES) { std::memcpy(to, &x, 4 * count); }

// The first numbers, and zeros.
inline Floats leading(int64_t count, Floats x) {
  typedef int32_t Numbers __attribute__((vector_size(4 * LANES)));
  const Numbers place = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return place < int32_t(count) ? x : Floats{};
}

inline float sum(Floats x) {
  struct {
    float __attribute__((vector_size(2 * LANES))) low, high;
  } halves;
  std::memcpy(&halves, &x, sizeof x);
  halves.low += halves.high;
  struct {
    float __attribute__((vector_size(LANES))) low, high;
  } quarters;
  std::memcpy(&quarters, &halves.low, sizeof quarters);
  quarters.low += quarters.high;
  return (quarters.low[0] + quarters.low[2]) + (quarters.low[1] + quarters.low[3]);
}

// x to the nearest whole number, and two to the power of that; x is from -127, which gives 0, to 128, which gives inf.
inline Floats power_of_two(Floats x, Floats& whole) {
  Floats shifted = x + 0x1.8p23f;  // its low bits are the whole number
  whole = shifted - 0x1.8p23f;
  Words bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + 127) << 23;
  Floats power;
  std::memcpy(&power, &bits, sizeof power);
  return power;
}

inline Floats limited(Floats x, float low, float high) {  // NaN stays
  x = x < low ? all(low) : x;
  return x > high ? all(high) : x;
}

inline Floats exp2(Floats x) {
  Floats whole;
  x = limited(x, -127, 128);
  Floats power = power_of_two(x, whole), f = x - whole;
  Floats p = f * 1.5252733804059840e-5f + 1.5403530393381610e-4f;  // Taylor's, of 2^f
  p = p * f + 1.3333558146428443e-3f;
  p = p * f + 9.6181291076284772e-3f;
  p = p * f + 5.5504108664821580e-2f;
  p = p * f + 2.4022650695910071e-1f;
  p = p * f + 6.9314718055994531e-1f;
  return (p * f + 1.0f) * power;
}

inline Floats exp(Floats x) {
  Floats whole;
  x = limited(x, -88.0f, 88.73f);
  Floats power = power_of_two(x * 1.44269504f, whole);
  Floats f = x - whole * 0.693359375f;  // the logarithm of 2 in two parts, the first one with few bits
  f = f + whole * 2.12194440e-4f;
  Floats p = f * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  return (p * (f * f) + f + 1.0f) * power;
}

inline Floats softplus(Floats x) {
  Floats u = exp(x > 0 ? -x : x);  // log(1 + u) = 2 atanh(u / (2 + u))
  Floats s = u / (2.0f + u), square = s * s;
  Floats p = square * (1.0f / 15) + 1.0f / 13;
  p = p * square + 1.0f / 11;
  p = p * square + 1.0f / 9;
  p = p * square + 1.0f / 7;
  p = p * square + 1.0f / 5;
  p = p * square + 1.0f / 3;
  Floats log = 2.0f * (s + s * square * p);
  return x > 20.0f ? x : (x > 0 ? x : Floats{}) + log;
}

inline Floats silu(Floats x) { return x / (1.0f + exp(-x)); }

constexpr float LOG2_E = 1.44269504f;

// A rate for exp2. Of one of -inf a step of 0 decays nothing.
inline Floats rate_of(Floats rate) {
  rate *= LOG2_E;
  return rate < -1e30f ? all(-1e30f) : rate;
}
