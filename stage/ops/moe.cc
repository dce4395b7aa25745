#include "stage/ops/moe.h"

#include <algorithm>
#include <tuple>

#include "stage/base/check.h"

namespace qwen::ops {
namespace {

struct Tile {  // rows [begin, begin + count) of the sorted order, all of one row group and one expert
  int64_t expert, begin, count;
};
struct Order {
  std::vector<int64_t> sorted;   // position in sorted order -> flat index token * k + choice
  std::vector<int64_t> inverse;  // the other way round
  std::vector<Tile> tiles;
};

// A stable counting sort by (row group, expert). REQUIRES: `experts` contiguous on the host.
Order SortByExpert(const at::Tensor& experts, int64_t expert_count, const RowGroups& groups) {
  const int64_t k = experts.size(1), total = experts.numel();
  const int64_t* ids = experts.const_data_ptr<int64_t>();
  Order order{std::vector<int64_t>(total), std::vector<int64_t>(total), {}};
  std::vector<int64_t> next(expert_count);
  for (const RowGroup& group : groups) {
    const int64_t first = group.begin * k, last = first + group.count * k;
    std::fill(next.begin(), next.end(), 0);
    for (int64_t i = first; i < last; ++i) ++next[ids[i]];
    int64_t at = first;
    for (int64_t e = 0; e < expert_count; ++e) {
      const int64_t count = next[e];
      if (count > 0) order.tiles.push_back({e, at, count});
      next[e] = at;
      at += count;
    }
    for (int64_t i = first; i < last; ++i) {
      const int64_t position = next[ids[i]]++;
      order.sorted[position] = i;
      order.inverse[i] = position;
    }
  }
  return order;
}

at::Tensor IndexTensor(const std::vector<int64_t>& values, at::Device device) {
  return at::tensor(values, at::TensorOptions().dtype(at::kLong)).to(device);
}

}  // namespace

Routing Route(const at::Tensor& logits, int64_t k, RouterWeights normalisation, RouterTies ties) {
  const at::Tensor probabilities = at::softmax(logits, -1, at::kFloat);
  at::Tensor weights, experts;
  if (ties == RouterTies::kTopk) {
    std::tie(weights, experts) = at::topk(probabilities, k);
  } else {
    auto [values, order] = at::sort(probabilities, /*stable=*/true, /*dim=*/-1, /*descending=*/true);
    weights = values.narrow(-1, 0, k).contiguous();  // as topk returns it: the same summation order
    experts = order.narrow(-1, 0, k).contiguous();
  }
  if (normalisation == RouterWeights::kNormalised) weights.div_(weights.sum(-1, /*keepdim=*/true));
  return {experts, weights.to(logits.scalar_type())};
}

ExpertWeights MakeExpertWeights(at::Tensor gate_up, at::Tensor down) {
  QP_CHECK_EQ(gate_up.size(0), down.size(0));
  ExpertWeights result{std::move(gate_up), std::move(down), {}, {}};
  for (int64_t e = 0; e < result.gate_up.size(0); ++e) {
    result.gate_up_t.push_back(result.gate_up[e].t());
    result.down_t.push_back(result.down[e].t());
  }
  return result;
}

at::Tensor Experts(const at::Tensor& x, const Routing& routing, const ExpertWeights& weights, const RowGroups& groups) {
  const int64_t tokens = x.size(0), hidden = x.size(1), k = routing.experts.size(1);
  const int64_t expert_count = static_cast<int64_t>(weights.gate_up_t.size());
  const int64_t intermediate = weights.down.size(2);
  const Order order = SortByExpert(routing.experts.cpu(), expert_count, groups);

  const at::Tensor sorted = IndexTensor(order.sorted, x.device());
  const at::Tensor rows = x.index_select(0, sorted.div(k, "trunc"));
  at::Tensor gate_up = at::empty({tokens * k, 2 * intermediate}, x.options());
  for (const Tile& tile : order.tiles) {
    at::Tensor out = gate_up.narrow(0, tile.begin, tile.count);
    at::mm_out(out, rows.narrow(0, tile.begin, tile.count), weights.gate_up_t[tile.expert]);
  }
  RowGroups sorted_groups = groups;  // the same groups, k rows a token
  for (RowGroup& group : sorted_groups) group = {group.begin * k, group.count * k};
  const at::Tensor activated =
      Silu(gate_up.narrow(1, 0, intermediate), sorted_groups).mul_(gate_up.narrow(1, intermediate, intermediate));
  at::Tensor down = at::empty({tokens * k, hidden}, x.options());
  for (const Tile& tile : order.tiles) {
    at::Tensor out = down.narrow(0, tile.begin, tile.count);
    at::mm_out(out, activated.narrow(0, tile.begin, tile.count), weights.down_t[tile.expert]);
  }
  down.mul_(routing.weights.flatten().index_select(0, sorted).unsqueeze(1));
  return down.index_select(0, IndexTensor(order.inverse, x.device())).view({tokens, k, hidden}).sum(1);
}

}  // namespace qwen::ops
