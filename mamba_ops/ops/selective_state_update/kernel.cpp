// selective_state_update: each channel's state is read once, advanced by the row's tokens, and stored.
#include "common.h"

namespace {

struct Update {
  int64_t heads, dim, dstate, groups;
  bool is_softplus, rate_of_head;
  Rows rows;
  Slots slots, write_slots;
  Indices accepted;
  Tensor state, x, dt, A, B, C, D, z, bias, output;  // a head's or channel's parameter has strides of 0

  // Up to 16 channels, counted through all heads, from `first` on: of one group.
  void block(int64_t row, int64_t first, int64_t width, float* room) const {
    const int64_t length = rows.length(row), lead = rows.lead(row), begin = rows.begin(row);
    if (length == 0) return;
    int64_t column = 0;
    if (accepted) column = std::min(std::max<int64_t>(accepted.at(row) - 1, 0), slots.table.columns - 1);
    const int64_t source = slots.at(row, column);
    int64_t head[LANES], channel[LANES];
    for (int64_t i = 0; i < width; i++) head[i] = (first + i) / dim, channel[i] = (first + i) % dim;
    const bool one_head = head[0] == head[width - 1];
    auto gather = [&](const Tensor& of, int64_t offset, int64_t by_head, int64_t by_channel) {
      float found[LANES] = {};
      if (one_head)
        of.read(offset + head[0] * by_head + channel[0] * by_channel, by_channel, width, found);
      else
        for (int64_t i = 0; i < width; i++) of.read(offset + head[i] * by_head + channel[i] * by_channel, 1, 1, found + i);
      return some(found);
    };
    auto tokens = [&](const Tensor& of, int64_t t) {
      return gather(of, lead * of.strides[0] + (begin + t) * of.strides[1], of.strides[2], of.strides[3]);
    };
    auto write = [&](int64_t t, const float* y) {
      const int64_t *by = output.strides, offset = lead * by[0] + (begin + t) * by[1];
      if (one_head)
        output.write(offset + head[0] * by[2] + channel[0] * by[3], by[3], width, y);
      else
        for (int64_t i = 0; i < width; i++) output.write(offset + head[i] * by[2] + channel[i] * by[3], 1, 1, y + i);
    };
    if (source < 0) {
      const float zeros[LANES] = {};
      for (int64_t t = 0; t < length; t++) write(t, zeros);
      return;
    }

    // All steps first: what is done for 16 channels at once. Then each channel's state, from token to token.
    const int64_t padded = (dstate + LANES - 1) / LANES * LANES, group = head[0] / (heads / groups);
    float *ds = room, *us = ds + LANES * length, *ys = us + LANES * length, *bs = ys + LANES * length;
    float *cs = bs + padded * length, *s = cs + padded * length, *rates = s + padded;
    const Floats added = bias ? gather(bias, 0, bias.strides[0], bias.strides[1]) : Floats{};
    Floats rates_of_heads{};
    if (rate_of_head) rates_of_heads = rate_of(gather(A, 0, A.strides[0], A.strides[1]));
    for (int64_t t = 0; t < length; t++) {
      Floats d = tokens(dt, t);
      if (bias) d += added;
      if (is_softplus) d = softplus(d);
      put(d, ds + t * LANES), put(tokens(x, t), us + t * LANES);
      for (const Tensor* of : {&B, &C}) {
        float* to = (of == &B ? bs : cs) + t * padded;
        of->read(lead * of->strides[0] + (begin + t) * of->strides[1] + group * of->strides[2], of->strides[3], dstate, to);
        std::fill(to + dstate, to + padded, 0.0f);
      }
    }
    std::fill(s + dstate, s + padded, 0.0f);
    std::fill(rates, rates + padded, 0.0f);
    const bool in_place = state.type == FLOAT32 && state.strides[3] == 1 && dstate == padded && !accepted && !write_slots.table;
    float* const own = s;
    for (int64_t i = 0; i < width; i++) {
      auto place = [&](int64_t slot) {
        return slot * state.strides[0] + head[i] * state.strides[1] + channel[i] * state.strides[2];
      };
      if (in_place)
        s = state.floats(place(source));
      else
        state.read(place(source), state.strides[3], dstate, s = own);
      const float* rate = rates;
      if (!rate_of_head) {
        const int64_t of_channel = head[i] * A.strides[0] + channel[i] * A.strides[1];
        if (A.type == FLOAT32 && A.strides[2] == 1 && dstate == padded)
          rate = A.floats(of_channel);
        else
          A.read(of_channel, A.strides[2], dstate, rates);
      }
      for (int64_t t = 0; t < length; t++) {
        const float d = ds[t * LANES + i], pushed = d * us[t * LANES + i];
        const float *b = bs + t * padded, *c = cs + t * padded;
        Floats y{}, decay = exp2(all(rates_of_heads[i] * d));
        for (int64_t j = 0; j < padded; j += LANES) {
          if (!rate_of_head) decay = exp2(rate_of(some(rate + j)) * d);
          Floats now = some(s + j) * decay + pushed * some(b + j);
          if (dstate - j < LANES) now = leading(dstate - j, now);  // an infinity times what fills up is NaN
          y += now * some(c + j);
          put(now, s + j);
        }
        ys[t * LANES + i] = sum(y);
        if (accepted && write_slots.table && t < write_slots.table.columns) store(write_slots.at(row, t), place, s);
        if (accepted && !write_slots.table && t < slots.table.columns) store(slots.at(row, t), place, s);
      }
      if (!accepted && !in_place) store(write_slots.table ? write_slots.at(row) : source, place, s);
    }
    const Floats skip = D ? gather(D, 0, D.strides[0], D.strides[1]) : Floats{};
    for (int64_t t = 0; t < length; t++) {
      Floats y = some(ys + t * LANES, width);
      if (D) y += skip * some(us + t * LANES);
      if (z) y *= silu(tokens(z, t));
      put(y, ys + t * LANES);
      write(t, ys + t * LANES);
    }
  }

  template <class F>
  void store(int64_t slot, F place, const float* s) const {
    if (slot >= 0) state.write(place(slot), state.strides[3], dstate, s);
  }

  int64_t room(int64_t length) const {
    const int64_t padded = (dstate + LANES - 1) / LANES * LANES;
    return length * (3 * LANES + 2 * padded) + 2 * padded;
  }
};

}  // namespace

extern "C" void run(const int64_t* numbers) {
  Call call{numbers};
  const int64_t number = call.number(), heads = call.number(), dim = call.number(), dstate = call.number();
  const int64_t groups = call.number();
  const bool is_softplus = call.flag(), rate_of_head = call.flag();
  const int64_t threads = call.number(), null = call.number(), count = call.number(), tokens = call.number();
  const Indices bounds(call), slots(call), write_slots(call), accepted(call);
  const Tensor state(call, 4), x(call, 4), dt(call, 4), A(call, 3), B(call, 4), C(call, 4), D(call, 2), z(call, 4);
  const Tensor bias(call, 2), output(call, 4);
  const Update update{heads, dim, dstate, groups, is_softplus, rate_of_head, Rows{bounds, tokens},
                      Slots{slots, null, count}, Slots{write_slots, null, count}, accepted,
                      state, x, dt, A, B, C, D, z, bias, output};
  const int64_t width = heads / groups * dim, blocks = (width + LANES - 1) / LANES, all_blocks = number * groups * blocks;
  int64_t longest = 0;
  for (int64_t row = 0; row < number; row++) longest = std::max(longest, update.rows.length(row));
#pragma omp parallel num_threads(threads) if (number * heads * dim * dstate * longest > 1 << 17)
  {
    std::vector<float> room(update.room(longest));
#pragma omp for schedule(static)
    for (int64_t i = 0; i < all_blocks; i++) {
      const int64_t row = i / (groups * blocks), group = i / blocks % groups, within = i % blocks * LANES;
      update.block(row, group * width + within, std::min(LANES, width - within), room.data());
    }
  }
}
