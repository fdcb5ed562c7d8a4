// causal_conv1d_update: 16 channels of a row at a time have their window, old inputs and new ones, beside each other.
#include "common.h"

namespace {

struct Update {
  int64_t width, state_len, history;
  bool is_silu;
  Rows rows;
  Slots slots;
  Indices accepted;
  Tensor x, state, weight, bias, output;

  void block(int64_t row, int64_t first, int64_t channels, std::vector<float>& room) const {
    const int64_t length = rows.length(row), lead = rows.lead(row), begin = rows.begin(row);
    if (length == 0) return;
    const int64_t slot = slots.at(row);
    auto write = [&](int64_t t, const float* y) {
      output.write(lead * output.strides[0] + (begin + t) * output.strides[1] + first * output.strides[2],
                   output.strides[2], channels, y);
    };
    room.resize((history + length) * LANES);
    if (slot < 0) {
      std::fill(room.begin(), room.begin() + LANES, 0.0f);
      for (int64_t t = 0; t < length; t++) write(t, room.data());
      return;
    }
    // Read first: the output may be x.
    float* window = room.data();
    int64_t from = 0;
    if (accepted) from = std::min(std::max<int64_t>(accepted.at(row) - 1, 0), state_len - history);
    const int64_t place = slot * state.strides[0] + first * state.strides[1];
    state.read_tile(place + from * state.strides[2], state.strides[2], history, state.strides[1], channels, window);
    x.read_tile(lead * x.strides[0] + begin * x.strides[1] + first * x.strides[2], x.strides[1], length, x.strides[2],
                channels, window + history * LANES);
    Floats taps[8], added{};
    float found[LANES] = {};
    for (int64_t j = 0; j < width; j++) {
      weight.read(first * weight.strides[0] + j * weight.strides[1], weight.strides[0], channels, found);
      taps[j] = some(found);
    }
    if (bias) {
      bias.read(first * bias.strides[0], bias.strides[0], channels, found);
      added = some(found);
    }
    const int64_t older = history + 1 - width;  // columns that only move
    for (int64_t t = 0; t < length; t++) {
      Floats y = added;
      for (int64_t j = 0; j < width; j++) y += taps[j] * some(window + (t + older + j) * LANES);
      if (is_silu) y = silu(y);
      put(y, found);
      write(t, found);
    }
    // Columns that the next call may go back to: with accepted tokens all but the first of the window, as far as fits.
    const int64_t kept_from = accepted ? 1 : length;
    const int64_t kept = std::min(accepted ? length + history - 1 : history, state_len);
    for (int64_t k = 0; k < kept; k++)
      state.write(place + k * state.strides[2], state.strides[1], channels, window + (kept_from + k) * LANES);
  }
};

}  // namespace

extern "C" void run(const int64_t* numbers) {
  Call call{numbers};
  const int64_t number = call.number(), dim = call.number(), width = call.number(), state_len = call.number();
  const bool newest_last = call.flag(), is_silu = call.flag();
  const int64_t threads = call.number(), null = call.number(), count = call.number(), tokens = call.number();
  const Indices bounds(call), slots(call), accepted(call);
  const Tensor x(call, 3), state(call, 3), weight(call, 2), bias(call, 1), output(call, 3);
  const int64_t history = newest_last ? state_len : width - 1;
  const Update update{width,    state_len, history, is_silu, Rows{bounds, tokens}, Slots{slots, null, count},
                      accepted, x,         state,   weight,  bias,                 output};
  const int64_t blocks = (dim + LANES - 1) / LANES;
#pragma omp parallel num_threads(threads) if (number * tokens * dim > 1 << 16)
  {
    std::vector<float> room;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < number * blocks; i++) {
      const int64_t first = i % blocks * LANES;
      update.block(i / blocks, first, std::min(LANES, dim - first), room);
    }
  }
}
