// What is wrong with a request, and where: the details of errors. node wrong.js [HOST:PORT]
import { CLASSES, logits } from './data.js';
import { Client, QuerySelectError, tensor } from './queryselect.js';

const client = new Client(process.argv[2] ?? 'localhost:50051');
const pool = { logits: tensor(logits(10), [10, CLASSES]) };
const holes = logits(10);
holes[6 * CLASSES] = NaN;
const wrong = {
  'an input is missing': { pool, strategy: { k_center_greedy: {} }, stop: { max_items: 3 } },
  'a row is not finite': {
    pool: { logits: tensor(holes, [10, CLASSES]) },
    strategy: { margin: {} },
    stop: { max_items: 3 },
  },
  'more picks than rows': { pool, strategy: { margin: {} }, stop: { max_items: 11 } },
  'not served here': { pool: { ...pool, model: 'resnet' }, strategy: { margin: {} }, stop: { max_items: 3 } },
};

for (const [what, request] of Object.entries(wrong)) {
  try {
    await client.select(request, { timeout: 60_000 });
  } catch (error) {
    if (!(error instanceof QuerySelectError)) throw error;
    const { code, reason, field, message } = error;
    console.log(JSON.stringify({ what, code, reason, field, message }));
  }
}
client.close();
