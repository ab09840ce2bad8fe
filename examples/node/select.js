// What to label next, by three strategies, each in one message. node select.js [HOST:PORT]
import { CLASSES, DIMENSIONS, embeddings, logits } from './data.js';
import { Client, picks, retried, rows, tensor } from './queryselect.js';

const N = 1000;
const client = new Client(process.argv[2] ?? 'localhost:50051');

const pool = {
  embeddings: tensor(embeddings(N), [N, DIMENSIONS]),
  logits: tensor(logits(N), [N, CLASSES]),
  labeled: rows([0, 1, 2]),
};
const requests = {
  margin: { pool: { logits: pool.logits, labeled: pool.labeled }, strategy: { margin: {} } },
  k_center_greedy: {
    pool: { embeddings: pool.embeddings, labeled: pool.labeled },
    strategy: { k_center_greedy: { normalize: true } },
  },
  bait: { pool, strategy: { bait: { ridge: 0.5, fisher_scale: 'FISHER_SCALE_SUM', top_classes: 2 } } },
};

for (const [name, request] of Object.entries(requests)) {
  const answer = await retried(() => client.select({ ...request, stop: { max_items: 5 } }, { timeout: 60_000 }));
  console.log(name, JSON.stringify(picks(answer)));
}
client.close();
