// Steps of rows through all layers (decode_layers.h), and draws of tokens between them. Where
// layers are small, each thread takes rows of its own through all that happens to them: threads
// that shared a layer's stages would wait for each other longer than a stage takes.
#include "decode.h"

#include <chrono>
#include <numeric>

#include "decode_layers.h"

namespace fastrl {
namespace FASTRL_ISA {
namespace {

constexpr int64_t kSmallLayer = 2 << 20;  // bytes of weights that a core keeps near
constexpr int64_t kTogether = 8;          // steps of a part until rows are shared out again
constexpr std::chrono::milliseconds kPatience(100);  // after which a call returns to its caller

void decode_rows(const DecodeModel& model, const DecodeArgs& args, Arena& scratch, int threads) {
  scratch.reset();
#ifdef FASTRL_PAIRS
  if (model.type == Float::bf16) {
    return Decoder<Pairs>(model, args, scratch, threads).run();
  }
#endif
  Decoder<Floats>(model, args, scratch, threads).run();
}

// How rows are shared out: whole vectors of them, as evenly as that goes.
struct Parts {
  Parts(const DecodeModel& model, int64_t rows, int threads) : rows(rows) {
    const DecodeLayer& l = model.layers[0];
    int64_t weights = 0;
    for (const DecodeLinear* w : {&l.q, &l.k, &l.v, &l.o, &l.gate, &l.up, &l.down}) {
      weights += w->rows * w->depth;
    }
    if (threads > 1 && vectors() >= threads && weights * bytes(model.type) <= kSmallLayer) {
      count = ceil_div(ceil_div(vectors(), kVectors), threads) * threads;
    }
  }
  int64_t vectors() const { return ceil_div(rows, kLanes); }
  int64_t begin(int64_t part) const { return std::min(vectors() * part / count * kLanes, rows); }

  int64_t rows, count = 1;
};

// Whether no row reads what a row of another part writes in this call, as the tokens of a prompt
// do: the writer of each segment is found in one part.
bool are_apart(const DecodeArgs& a, const Parts& parts) {
  std::vector<int64_t> writer;
  for (int64_t part = 0; part < parts.count; ++part) {
    for (int64_t row = parts.begin(part); row < parts.begin(part + 1); ++row) {
      const int64_t s = a.chain[a.chain_begin[row + 1] - 1];
      writer.resize(std::max<int64_t>(writer.size(), s + 1), -1);
      if (writer[s] >= 0 && writer[s] != part) {
        return false;
      }
      writer[s] = part;
    }
  }
  return true;
}

void make_room(DecodeScratch& scratch, int64_t parts) {
  if (static_cast<int64_t>(scratch.size()) < parts) {
    scratch.resize(parts);
  }
}

// Rows on their way through draws and steps: of all that a call was given, the `live` ones, each
// with the token it has yet to read.
class Generation {
 public:
  Generation(const DecodeModel& model, const GenerateArgs& args, DecodeScratch& scratch,
             int threads)
      : m_(model), a_(args), scratch_(scratch), threads_(threads), live_(args.decode.rows) {
    std::iota(live_.begin(), live_.end(), 0);
    std::fill_n(a_.count, a_.decode.rows, 0);
    tokens_.resize(a_.decode.rows);
    if (a_.decode.tokens) {
      std::copy_n(a_.decode.tokens, a_.decode.rows, tokens_.begin());
    }
  }

  void run() {
    const auto end = std::chrono::steady_clock::now() + kPatience;
    for (int64_t done = 0; done<a_.steps&& static_cast<int64_t>(live_.size())> a_.fewest;) {
      const Parts parts(m_, live_.size(), threads_);
      const int64_t steps = parts.count > 1 ? std::min(kTogether, a_.steps - done) : 1;
      make_room(scratch_, parts.count);
      std::vector<std::vector<int64_t>> left(parts.count);
      parallel_for(parts.count, threads_, [&](int64_t part) {
        left[part].assign(live_.begin() + parts.begin(part), live_.begin() + parts.begin(part + 1));
        for (int64_t i = 0; i < steps && !left[part].empty(); ++i) {
          step(left[part], done + i, scratch_[part], parts.count > 1 ? 1 : threads_);
        }
      });
      live_.clear();
      for (const auto& rows : left) {
        live_.insert(live_.end(), rows.begin(), rows.end());
      }
      done += steps;
      if (std::chrono::steady_clock::now() > end) {
        return;
      }
    }
  }

 private:
  // Each row reads the token it last drew, if it did, and draws one. Those that end leave `rows`.
  void step(std::vector<int64_t>& rows, int64_t done, Arena& scratch, int threads) {
    const int64_t n = rows.size(), row_bytes = m_.width * bytes(m_.type);
    Buffer<char> hidden(n * row_bytes);
    if (done == 0 && !a_.decode.tokens) {
      for (int64_t i = 0; i < n; ++i) {
        std::memcpy(hidden.get() + i * row_bytes,
                    static_cast<const char*>(a_.decode.hidden) + rows[i] * row_bytes, row_bytes);
      }
    } else {
      read(rows, done - !a_.decode.tokens, hidden.get(), scratch, threads);
    }
    draw(rows, hidden.get(), threads);
  }

  void read(const std::vector<int64_t>& rows, int64_t taken, void* hidden, Arena& scratch,
            int threads) const {
    const DecodeArgs& all = a_.decode;
    std::vector<int64_t> tokens, positions, chain_begin = {0}, chain;
    for (int64_t r : rows) {
      tokens.push_back(tokens_[r]);
      positions.push_back(all.positions[r] + taken);
      chain.insert(chain.end(), all.chain + all.chain_begin[r], all.chain + all.chain_begin[r + 1]);
      chain_begin.push_back(chain.size());
    }
    DecodeArgs some = all;
    some.rows = rows.size();
    some.tokens = tokens.data();
    some.positions = positions.data();
    some.chain_begin = chain_begin.data();
    some.chain = chain.data();
    some.hidden = hidden;
    decode_rows(m_, some, scratch, threads);
  }

  void draw(std::vector<int64_t>& rows, const void* hidden, int threads) {
    const int64_t n = rows.size();
    std::vector<int64_t> seeds, positions, token(n);
    std::vector<float> inv_temperature, logprob(n), untruncated(n);
    for (int64_t r : rows) {
      seeds.push_back(a_.sample.seeds[r]);
      positions.push_back(a_.sample.positions[r] + a_.count[r]);
      inv_temperature.push_back(a_.sample.linear.inv_temperature[r]);
    }
    SampleArgs some = a_.sample;
    some.linear.rows = n;
    some.linear.hidden = hidden;
    some.linear.inv_temperature = inv_temperature.data();
    some.seeds = seeds.data();
    some.positions = positions.data();
    some.token = token.data();
    some.logprob = logprob.data();
    some.untruncated = untruncated.data();
    linear_sample(some, threads);
    size_t left = 0;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t r = rows[i], at = r * a_.steps + a_.count[r]++;
      a_.sample.token[at] = tokens_[r] = token[i];
      a_.sample.logprob[at] = logprob[i];
      a_.sample.untruncated[at] = untruncated[i];
      const auto* stop = std::find(a_.stops, a_.stops + a_.stop_count, token[i]);
      if (stop == a_.stops + a_.stop_count && a_.count[r] < a_.room[r]) {
        rows[left++] = r;
      }
    }
    rows.resize(left);
  }

  const DecodeModel& m_;
  const GenerateArgs& a_;
  DecodeScratch& scratch_;
  const int threads_;
  std::vector<int64_t> live_, tokens_;
};

}  // namespace

void decode(const DecodeModel& model, const DecodeArgs& args, DecodeScratch& scratch, int threads) {
  Parts parts(model, args.rows, threads);
  if (!are_apart(args, parts)) {
    parts.count = 1;
  }
  make_room(scratch, parts.count);
  parallel_for(parts.count, threads, [&](int64_t part) {
    const int64_t first = parts.begin(part);
    DecodeArgs some = args;
    some.rows = parts.begin(part + 1) - first;
    some.tokens += first;
    some.positions += first;
    some.chain_begin += first;
    some.hidden = static_cast<char*>(args.hidden) + first * model.width * bytes(model.type);
    decode_rows(model, some, scratch[part], parts.count > 1 ? 1 : threads);
  });
}

void generate(const DecodeModel& model, const GenerateArgs& args, DecodeScratch& scratch,
              int threads) {
  Generation(model, args, scratch, threads).run();
}

}  // namespace FASTRL_ISA
}  // namespace fastrl
