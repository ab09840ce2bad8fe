// A pool that is too large for one message: 7 MB there in chunks, the score of every row back in chunks.
// node stream.js [HOST:PORT]
import { CLASSES, DIMENSIONS, embeddings, logits } from './data.js';
import { Client, elements, picks, retried, tensor } from './queryselect.js';

const N = 150_000;
const client = new Client(process.argv[2] ?? 'localhost:50051');

const request = {
  pool: {
    embeddings: tensor(embeddings(N), [N, DIMENSIONS]),
    logits: tensor(logits(N), [N, CLASSES]),
  },
  strategy: { expected_gradient_length: {} },
  stop: { max_items: 5 },
  returns: ['RETURN_POOL_SCORES'],
};
const onProgress = ({ phase, done = '0', total = '?' }) => console.error(`${phase} ${done} of ${total}`);
const answer = await retried(() => client.stream(request, { timeout: 60_000, onProgress }));

console.log('picks', JSON.stringify(picks(answer)));
const scores = elements(answer.pool_scores);
console.log('scores', scores.length, Math.max(...scores.subarray(0, 1000)));
client.close();
