// selective_scan: a block of channels of one row has its states in registers, and reads the row's tokens once.
#include "common.h"

namespace {

constexpr int64_t TILE = 32;  // tokens that are converted at a time

struct Scan {
  int64_t number, dim, dstate, groups;
  bool is_softplus;
  Rows rows;
  Slots slots, write_slots;
  Indices has_initial_state;
  Tensor x, dt, A, B, C, D, z, bias, state, output;

  // Channels `first` to `first + width - 1`, which are of one group, of a row.
  template <int64_t STATES>
  void block(int64_t row, int64_t first, int64_t width) const {
    const int64_t states = STATES ? STATES : dstate;
    const int64_t length = rows.length(row), lead = rows.lead(row), begin = rows.begin(row);
    const int64_t source = slots.at(row), target = write_slots.table ? write_slots.at(row) : source;
    std::vector<float> room((4 * LANES + 2 * states) * TILE);
    float *xs = room.data(), *ds = xs + LANES * TILE, *zs = ds + LANES * TILE, *ys = zs + LANES * TILE;
    float *bs = ys + LANES * TILE, *cs = bs + states * TILE;
    if (source < 0) {
      std::memset(ys, 0, 4 * LANES * TILE);
      for (int64_t t = 0; t < length; t++) write(lead, begin + t, first, width, ys);
      return;
    }
    Floats local_rates[STATES ? STATES : 1], local[STATES ? STATES : 1];
    std::vector<Floats> longer(STATES ? 0 : 2 * states);
    Floats *rates = STATES ? local_rates : longer.data(), *s = STATES ? local : rates + states;
    const bool begun = state && has_initial_state && has_initial_state.at(row);
    for (int64_t j = 0; j < states; j++) {
      float column[LANES] = {};
      A.read(first * A.strides[0] + j * A.strides[1], A.strides[0], width, column);
      rates[j] = rate_of(some(column));
      s[j] = Floats{};
      if (begun) {
        state.read(source * state.strides[0] + first * state.strides[1] + j * state.strides[2], state.strides[1], width,
                   column);
        s[j] = some(column, width);
      }
    }
    float of_channels[2][LANES] = {};
    if (bias) bias.read(first * bias.strides[0], bias.strides[0], width, of_channels[0]);
    if (D) D.read(first * D.strides[0], D.strides[0], width, of_channels[1]);
    const Floats added = some(of_channels[0]), skip = some(of_channels[1]);
    const int64_t group = first / (dim / groups);

    for (int64_t t0 = 0; t0 < length; t0 += TILE) {
      const int64_t tokens = std::min(TILE, length - t0), place = begin + t0;
      auto tile = [&](const Tensor& of, float* to) {
        of.read_tile(lead * of.strides[0] + place * of.strides[1] + first * of.strides[2], of.strides[1], tokens,
                     of.strides[2], width, to);
      };
      auto columns = [&](const Tensor& of, float* to) {
        for (int64_t t = 0; t < tokens; t++)
          of.read(lead * of.strides[0] + (place + t) * of.strides[1] + group * of.strides[2], of.strides[3], states,
                  to + t * states);
      };
      tile(x, xs), tile(dt, ds), columns(B, bs), columns(C, cs);
      if (z) tile(z, zs);
      for (int64_t t = 0; t < tokens; t++) {
        Floats d = some(ds + t * LANES), u = some(xs + t * LANES);
        if (bias) d += added;
        if (is_softplus) d = softplus(d);
        const Floats pushed = d * u;
        Floats y{};
        for (int64_t j = 0; j < states; j++) {
          s[j] = s[j] * exp2(rates[j] * d) + pushed * bs[t * states + j];
          y += s[j] * cs[t * states + j];
        }
        if (D) y += skip * u;
        if (z) y *= silu(some(zs + t * LANES));
        put(y, ys + t * LANES);
      }
      for (int64_t t = 0; t < tokens; t++) write(lead, place + t, first, width, ys + t * LANES);
    }
    if (!state || target < 0 || (length == 0 && target == source)) return;
    for (int64_t j = 0; j < states; j++) {
      float column[LANES];
      put(s[j], column);
      state.write(target * state.strides[0] + first * state.strides[1] + j * state.strides[2], state.strides[1], width,
                  column);
    }
  }

  void write(int64_t lead, int64_t token, int64_t first, int64_t width, const float* y) const {
    output.write(lead * output.strides[0] + token * output.strides[1] + first * output.strides[2], output.strides[2],
                 width, y);
  }
};

}  // namespace

extern "C" void run(const int64_t* numbers) {
  Call call{numbers};
  const int64_t number = call.number(), dim = call.number(), dstate = call.number(), groups = call.number();
  const bool is_softplus = call.flag();
  const int64_t threads = call.number(), null = call.number(), slot_count = call.number(), tokens = call.number();
  const Indices bounds(call), slots(call), write_slots(call), begun(call);
  const Tensor x(call, 3), dt(call, 3), A(call, 2), B(call, 4), C(call, 4), D(call, 1), z(call, 3), bias(call, 1);
  const Tensor state(call, 3), output(call, 3);
  const Scan scan{number,      dim,
                  dstate,      groups,
                  is_softplus, Rows{bounds, tokens},
                  Slots{slots, null, slot_count}, Slots{write_slots, null, slot_count},
                  begun,       x, dt, A, B, C, D, z, bias, state, output};
  const int64_t width = dim / groups, blocks = (width + LANES - 1) / LANES, all_blocks = number * groups * blocks;
#pragma omp parallel for schedule(static) num_threads(threads) if (all_blocks > 1 && tokens * dim * dstate > 1 << 15)
  for (int64_t i = 0; i < all_blocks; i++) {
    const int64_t row = i / (groups * blocks), group = i / blocks % groups, within = i % blocks * LANES;
    const int64_t first = group * width + within, of_block = std::min(LANES, width - within);
    if (dstate == 16)
      scan.block<16>(row, first, of_block);
    else
      scan.block<0>(row, first, of_block);
  }
}
