#include "controller/reconcile/load_watch.h"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "stage/contract/pod_contract.h"

namespace qwen::reconcile {

LoadPercents ParseLoads(const std::string& body) {
  LoadPercents loads;
  const auto json = nlohmann::json::parse(body, nullptr, /*allow_exceptions=*/false);
  if (!json.is_object() || !json.contains("stages") || !json["stages"].is_array()) return loads;
  for (const auto& item : json["stages"]) {
    if (!item.is_object() || loads.size() >= static_cast<size_t>(contract::kStagesMax)) return {};
    const auto flag = [&](const char* key) { return item.contains(key) && item[key] == true; };
    const auto percent = item.find("load_percent");
    if (flag("loaded")) {
      loads.push_back(100);
    } else if (!flag("connected") || percent == item.end() || !percent->is_number_integer()) {
      loads.push_back(-1);
    } else {
      loads.push_back(std::clamp(percent->get<int32_t>(), 0, 99) / 10 * 10);
    }
  }
  return loads;
}

void LoadWatch::Start() {
  thread_ = std::thread([this] {
    std::unique_lock<std::mutex> lock(mutex_);
    while (!stopping_) {
      if (heads_.empty()) {
        changed_.wait(lock);
        continue;
      }
      lock.unlock();
      AskAll();
      lock.lock();
      changed_.wait_for(lock, kPeriod, [this] { return stopping_; });
    }
  });
}

void LoadWatch::Stop() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
  }
  changed_.notify_all();
  if (thread_.joinable()) thread_.join();
}

void LoadWatch::Follow(const kube::ObjectKey& pipeline, std::map<std::string, std::string> heads) {
  std::lock_guard<std::mutex> lock(mutex_);
  std::erase_if(heads_, [&](const auto& entry) { return entry.second.pipeline == pipeline && !heads.contains(entry.first); });
  if (heads.empty()) return;
  for (auto& [uid, address] : heads) heads_.try_emplace(uid, Head{pipeline, std::move(address), {}});
  changed_.notify_all();
}

LoadPercents LoadWatch::Of(const std::string& head_uid) const {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto found = heads_.find(head_uid);
  return found == heads_.end() ? LoadPercents() : found->second.loads;
}

void LoadWatch::AskAll() {
  std::vector<std::pair<std::string, std::string>> round;  // uid, address
  {
    std::lock_guard<std::mutex> lock(mutex_);
    for (const auto& [uid, head] : heads_) round.emplace_back(uid, head.address);
  }
  for (const auto& [uid, address] : round) {
    const Result<std::string> body = ask_(address);
    LoadPercents loads = body.ok() ? ParseLoads(*body) : LoadPercents();
    kube::ObjectKey news;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (stopping_) return;
      const auto found = heads_.find(uid);
      if (found == heads_.end() || loads.empty() || found->second.loads == loads) continue;  // no answer is no news
      found->second.loads = std::move(loads);
      news = found->second.pipeline;
    }
    on_news_(news);
  }
}

}  // namespace qwen::reconcile
