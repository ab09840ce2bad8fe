// A made-up pool, the same in every language: what an embedding and logits look like to the service is all that counts.

/** Numbers from -1 to 1 that look drawn and are computed. */
function numbers(rows, columns, factor) {
  const values = new Float32Array(rows * columns);
  for (let at = 0; at < values.length; at++) values[at] = ((at * factor) % 1000003) / 500001.5 - 1;
  return values;
}

export const DIMENSIONS = 8;
export const CLASSES = 4;
export const embeddings = (rows) => numbers(rows, DIMENSIONS, 7919);
export const logits = (rows) => numbers(rows, CLASSES, 104729);
