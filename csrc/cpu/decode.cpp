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
constexpr int64_t kStepsTogether = 8;     // steps of a part until rows are shared out again
constexpr std::chrono::milliseconds kPatience(100);  // after which a call returns to its caller

void decode_rows(const DecodeModel& model, const DecodeArgs& args, Arena& scratch, int threads) {
  scratch.reset();
  if (model.int8) {
    return Decoder<Int8>(model, args, scratch, threads).run();
  }
#ifdef FASTRL_PAIRS
  if (model.type == Float::bf16) {
    return Decoder<Pairs>(model, args, scratch, threads).run();
  }
#endif
  Decoder<Floats>(model, args, scratch, threads).run();
}

// Whether threads take rows of their own.
bool worth_splitting(const DecodeModel& model, int64_t rows, int threads) {
  const DecodeLayer& l = model.layers[0];
  int64_t weights = 0;
  for (const DecodeLinear* w : {&l.q, &l.k, &l.v, &l.o, &l.gate, &l.up, &l.down}) {
    weights += w->rows * w->depth;
  }
  return threads > 1 && ceil_div(rows, kLanes) >= threads &&
         weights * (model.int8 ? 1 : bytes(model.type)) <= kSmallLayer;
}

// Where the first of `rows` of each of `parts` is, and the end: whole vectors, as evenly as that
// goes.
std::vector<int64_t> split(int64_t rows, int64_t parts) {
  std::vector<int64_t> cuts;
  for (int64_t part = 0; part <= parts; ++part) {
    cuts.push_back(std::min(ceil_div(rows, kLanes) * part / parts * kLanes, rows));
  }
  return cuts;
}

// The same, of rows of which some may read what others write in this call, as the tokens of a
// prompt do: those follow one another, and stay in one part.
std::vector<int64_t> split_apart(const DecodeArgs& a, int64_t parts) {
  const auto writes = [&](int64_t row) { return a.chain[a.chain_begin[row + 1] - 1]; };
  std::vector<int64_t> cuts = split(a.rows, parts), writer;
  int64_t most = 0;
  for (int64_t part = 0; part < parts; ++part) {
    int64_t& end = cuts[part + 1];
    end = std::max(end, cuts[part]);
    while (0 < end && end < a.rows && writes(end) == writes(end - 1)) {
      ++end;
    }
    most = std::max(most, end - cuts[part]);
    for (int64_t row = cuts[part]; row < end; ++row) {
      const int64_t s = writes(row);
      writer.resize(std::max<int64_t>(writer.size(), s + 1), -1);
      if (writer[s] >= 0 && writer[s] != part) {
        return {0, a.rows};
      }
      writer[s] = part;
    }
  }
  return 2 * most * parts <= 3 * a.rows ? cuts : std::vector<int64_t>{0, a.rows};
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
      const int64_t rows = live_.size();
      const bool apart = worth_splitting(m_, rows, threads_);
      const int64_t parts = apart ? ceil_div(ceil_div(rows, kPanel), threads_) * threads_ : 1;
      const int64_t steps = apart ? std::min(kStepsTogether, a_.steps - done) : 1;
      const std::vector<int64_t> cuts = split(rows, parts);
      make_room(scratch_, parts);
      std::vector<std::vector<int64_t>> left(parts);
      parallel_for(parts, threads_, [&](int64_t part) {
        left[part].assign(live_.begin() + cuts[part], live_.begin() + cuts[part + 1]);
        for (int64_t i = 0; i < steps && !left[part].empty(); ++i) {
          step(left[part], done + i, scratch_[part], apart ? 1 : threads_);
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
  std::vector<int64_t> cuts = {0, args.rows};
  if (worth_splitting(model, args.rows, threads)) {
    cuts = split_apart(args, threads);
  }
  const int64_t parts = cuts.size() - 1;
  make_room(scratch, parts);
  parallel_for(parts, threads, [&](int64_t part) {
    const int64_t first = cuts[part];
    DecodeArgs some = args;
    some.rows = cuts[part + 1] - first;
    some.tokens += first;
    some.positions += first;
    some.chain_begin += first;
    some.hidden = static_cast<char*>(args.hidden) + first * model.width * bytes(model.type);
    if (some.rows > 0) {
      decode_rows(model, some, scratch[part], parts > 1 ? 1 : threads);
    }
  });
}

void generate(const DecodeModel& model, const GenerateArgs& args, DecodeScratch& scratch,
              int threads) {
  Generation(model, args, scratch, threads).run();
}

}  // namespace FASTRL_ISA
}  // namespace fastrl
