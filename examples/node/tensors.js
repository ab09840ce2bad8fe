// Tensors as they travel: raw elements, little-endian, row after row, with their type and their shape.
import os from 'node:os';

if (os.endianness() !== 'LE') throw new Error('tensors travel little-endian, and this machine is not');

const TYPES = {
  DATA_TYPE_F64: Float64Array,
  DATA_TYPE_F32: Float32Array,
  DATA_TYPE_I64: BigInt64Array,
  DATA_TYPE_I32: Int32Array,
  DATA_TYPE_U8: Uint8Array,
};

/** A tensor of a typed array, whose bytes are not copied. Without a shape it has one dimension. */
export function tensor(values, shape = [values.length]) {
  const dtype = Object.keys(TYPES).find((name) => TYPES[name] === values.constructor);
  if (!dtype) throw new TypeError(`a tensor needs a typed array; this is ${values.constructor.name}`);
  if (shape.reduce((product, size) => product * size, 1) !== values.length) {
    throw new RangeError(`${values.length} elements are not of shape (${shape.join(' ')})`);
  }
  return { dtype, shape, data: Buffer.from(values.buffer, values.byteOffset, values.byteLength) };
}

/** A list of rows by their numbers. */
export const rows = (numbers) => tensor(BigInt64Array.from(numbers, BigInt));

/** A list of rows by one truth value for each row of the pool. */
export const mask = (values) => ({
  dtype: 'DATA_TYPE_BOOL',
  shape: [values.length],
  data: Buffer.from(values.map(Number)),
});

/** The bytes that a tensor of an answer has; its shape comes as texts, since a number of JavaScript ends at 2^53. */
export const byteLength = ({ dtype, shape = [] }) =>
  shape.reduce((product, size) => product * Number(size), TYPES[dtype].BYTES_PER_ELEMENT);

/** The elements of a tensor of an answer: BigInt64Array for indices, Float64Array for scores. */
export function elements({ dtype, data }) {
  const aligned = new Uint8Array(data); // a copy: a message's bytes may begin anywhere, a typed array may not
  return new TYPES[dtype](aligned.buffer);
}

/** The picks of an answer: rows, which are numbers here, and their scores, in the order of choice. */
export function picks({ indices, scores }) {
  const chosen = elements(scores);
  return Array.from(elements(indices), (row, at) => ({ row: Number(row), score: chosen[at] }));
}
